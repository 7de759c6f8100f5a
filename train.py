"""Train a recommender: `python train.py model=small attention=jagged_flash`, or the same under `torchrun`."""

import hydra
from omegaconf import DictConfig

from recsys.config import explain_config_errors, load, register
from recsys.training.run import run

register()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Compose, check, train."""
    run(load(config))


if __name__ == "__main__":
    explain_config_errors(main)

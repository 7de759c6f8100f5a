"""What `train.py` calls: one process of a run, from a checked config to its summary."""

import logging
import os
import sys
import warnings

from omegaconf import OmegaConf

from recsys.config import ConfigMistake, TrainConfig
from recsys.training.build import build_parts
from recsys.training.checkpoint import CheckpointRefused
from recsys.training.distributed import choose_device, process_group, seed_everything
from recsys.training.run_dir import RunDir
from recsys.training.summary import Summary
from recsys.training.trainer import Trainer


def run(config: TrainConfig) -> Summary | None:
    """Train as `config` says, on the ranks that `torchrun` started or on one; `None` if a resumed run was done already.

    Raises:
        ConfigMistake: on every rank, for a choice that can't be had here; what needs no other rank to find out is
            found before any collective.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # torchrun sets it; TorchRec asks for it
    _configure_logging(is_main=int(os.environ.get("RANK", 0)) == 0)
    seed_everything(config.seed)
    try:
        device = choose_device(config.trainer.device)
        parts = build_parts(config, device, world_size)
    except ValueError as error:
        raise ConfigMistake(str(error)) from error
    with process_group(device, config.trainer.timeout_minutes) as ranks:
        try:
            run_dir = RunDir.open(
                ranks,
                run_dir=config.paths.run_dir,
                runs_root=config.paths.runs_root,
                name=config.name,
                resume=config.trainer.resume == "auto",
            )
            trainer = Trainer(config, parts, ranks, run_dir)
        except CheckpointRefused as error:
            raise ConfigMistake(
                f"{error}\nA resumed run takes its configuration from the command line: repeat the overrides of that "
                "run, which its config.yaml shows, or name another with paths.run_dir"
            ) from error
        except ValueError as error:  # alike on every rank: a plan that fits nowhere
            raise ConfigMistake(str(error)) from error
        if trainer.is_done:
            trainer.reporter.say(
                f"{run_dir.path} is at step {trainer.progress.step:,} already: nothing to do up to "
                f"trainer.max_steps={config.trainer.max_steps:,}"
            )
            return None
        run_dir.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        summary = trainer.fit()
        run_dir.write_text("summary.json", summary.to_json())
        trainer.reporter.say(f"\n{summary.table()}\n\nrun directory: {run_dir.path}")
        return summary


def _configure_logging(is_main: bool) -> None:
    """Our own messages on rank 0, warnings of everybody, to standard error; without what users can do nothing about."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("recsys").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # about how TorchRec traces
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrec")
    warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor")  # TorchRec returns both
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # Replicated pooled tables on a CPU: tests/sharding compares their gradients with unsharded training.
    warnings.filterwarnings("ignore", message=".*dense_embedding_codegen_lookup_function: an autograd kernel")
    logging.getLogger("torchrec.distributed.utils").setLevel(logging.ERROR)  # about caches that nobody configured
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: "Sharding spec not found" not in record.getMessage())  # replicated tables

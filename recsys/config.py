"""The root of the configuration: Hydra composes it, `load` checks it and makes objects of it.

Each group's dataclass lives beside the code that it configures; `configs/` holds values only.
"""

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from data.config import DataConfig, SyntheticConfig
from recsys.attention.config import AttentionConfig
from recsys.models.config import MixerKind, ModelConfig
from recsys.sharding import ShardingConfig
from recsys.training.config import PathsConfig, TrainerConfig
from recsys.training.optimizer import OptimizerConfig


@dataclass
class TrainConfig:
    """Everything that `train.py` can be told."""

    name: str = "train"
    """Name of the run; runs of a name share a directory."""

    seed: int = 1
    """Of initialisation and dropout; `data.seed` determines the data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    data: DataConfig = field(default_factory=SyntheticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        if self.model.mixer is MixerKind.mean_pool and (self.attention.window or self.attention.dropout):
            raise ValueError(
                "model.mixer=mean_pool has neither window nor dropout: leave attention.window and .dropout unset"
            )
        if self.model.mixer is MixerKind.target and self.attention.window:
            raise ValueError(
                "model.mixer=target has no window, candidates see the whole history: unset attention.window"
            )


def register() -> None:
    """Make the schemas known to Hydra; call before composing."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="data", name="synthetic_schema", node=SyntheticConfig)


class ConfigMistake(ValueError):
    """A mistake of the user that shows before training starts; `train.py` reports it without a traceback."""


def load(composed: DictConfig) -> TrainConfig:
    """Check a composed config and make a `TrainConfig` of it.

    Raises:
        ConfigMistake: a value is impossible; the message names the key and what is allowed.
    """
    try:
        config = OmegaConf.to_object(composed)
    except ValueError as error:  # from the checks of a dataclass
        raise ConfigMistake(str(error)) from error
    assert isinstance(config, TrainConfig)
    return config


def explain_config_errors(main: Callable[[], Any]) -> None:
    """Run a Hydra entry; a mistake in the configuration ends it with one message instead of a traceback.

    Hydra itself would cut every traceback short, also those of a failing run; here only configuration errors are.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to here
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"configuration error: {describe(error)}")
    except ConfigMistake as error:
        sys.exit(f"configuration error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: trainer.resume=auto goes on from the newest checkpoint, if there is one")


def describe(error: Exception) -> str:
    """Hydra's or OmegaConf's message, with the keys that would have been allowed."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        message = str(cause).strip()
        if message not in "\n".join(lines):
            lines.append(message)
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            lines.append(_allowed_keys(cause))
        cause = cause.__cause__
    return "\n".join(line for line in lines if line)


def _allowed_keys(error: OmegaConfBaseException) -> str:
    """Which keys exist where an unknown one was given."""
    if error.object_type is None or not is_dataclass(error.object_type):
        return ""
    allowed = [f.name for f in fields(error.object_type)]
    near = difflib.get_close_matches(str(error.key), allowed, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed keys are: {', '.join(allowed)}"

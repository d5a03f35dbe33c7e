"""Configuration as frozen values, and their composition from Hydra groups.

`mbfn.config.compose` holds `compose` and `hydra_main`; what is here imports neither Hydra nor OmegaConf.
"""

from mbfn.config.data import DataConfig
from mbfn.config.model import ModelConfig, RopeScaling
from mbfn.config.optim import OptimConfig, ScheduleConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.peft import PeftConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.schema import to_dict, to_yaml
from mbfn.config.site import SiteConfig
from mbfn.config.train import CheckpointConfig, InitConfig, LaunchConfig, LogConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "InitConfig",
    "LaunchConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PeftConfig",
    "PrecisionConfig",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "SiteConfig",
    "TrainConfig",
    "to_dict",
    "to_yaml",
]

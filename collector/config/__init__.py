"""The configuration: one TOML file and the environment, turned into typed, frozen values, or refused in one line."""

from collector.config.clashes import check_together
from collector.config.credentials import Credentials, take_secrets
from collector.config.keys import ConfigError
from collector.config.reader import build_config, load_config, read_connection
from collector.config.values import Config, Connection, Exchange

__all__ = [
    "Config", "ConfigError", "Connection", "Credentials", "Exchange", "build_config", "check_together", "load_config",
    "read_connection", "take_secrets",
]  # fmt: skip

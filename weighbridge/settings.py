"""Every setting, composed of the rooms' own groups; read once in main and passed down, frozen.

Precedence: flags > environment (`WEIGHBRIDGE_REGISTRY__PORT`) > `weighbridge.toml` > defaults. Nothing here reads the
environment at import, and no value is repeated in an error: it may be a secret in the wrong place.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from weighbridge.daemon.settings import DaemonSettings
from weighbridge.hosts.settings import HostSettings
from weighbridge.registry.local import DATA
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import BrokerSettings, RegistrySettings
from weighbridge.storage.settings import StorageSettings
from weighbridge.workers.benchmarking.machine import own_folder
from weighbridge.workers.settings import WorkerSettings

PREFIX = "WEIGHBRIDGE_"
CONFIG = "WEIGHBRIDGE_CONFIG"
FILE = Path("weighbridge.toml")
SHORT = {"WEIGHBRIDGE_URL": ("registry", "url"), "WEIGHBRIDGE_TOKEN": ("registry", "token")}
"""What `weighbridge.Client` reads too: short names of two settings, for people who only talk to a registry."""

Path_ = tuple[str, ...]


class ConfigError(ValueError):
    """The settings break a rule; the message names the source, the field and the rule of everything that is wrong."""


class LogSettings(BaseModel):
    """What processes write to stderr."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level to write.")
    format: Literal["human", "json"] = Field(default="human", description="human: one line for people; json: for logs.")


class Settings(BaseSettings):
    """The effective settings of a process. Build it with `load`; the constructor alone reads no source."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )

    data: Path = Field(
        default=Path(DATA),
        description="Folder that relative paths of the database, the worker's cache and the host's data lie in; closed "
        "to other users, since the registry leaves an administrator's token there.",
    )
    storage: StorageSettings = Field(default_factory=StorageSettings)
    registry: RegistrySettings = Field(default_factory=RegistrySettings)
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    daemon: DaemonSettings = Field(default_factory=DaemonSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    host: HostSettings = Field(default_factory=HostSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    policies: tuple[Policy, ...] = Field(
        default=(), description="What no recipe weakens, first match of `model` counts (docs/recipe.md, 'Policy')."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` merges the others itself, to know each value's origin

    @property
    def registry_url(self) -> str:
        """Where clients reach the API."""
        scheme = "https" if self.registry.tls_certificate else "http"
        return self.registry.url or f"{scheme}://{_reachable(self.registry.host)}:{self.registry.port}"

    @property
    def database_url(self) -> SecretStr:
        """The database's URL; a relative SQLite file lies in `data`."""
        url = self.registry.database.get_secret_value()
        file = url.removeprefix("sqlite:///")
        if file == url or file.startswith("/") or file in ("", ":memory:"):
            return self.registry.database
        return SecretStr(f"sqlite:///{(self.data / file).absolute()}")

    @property
    def worker_settings(self) -> WorkerSettings:
        """The worker's group with the real places of its cache and of its locks."""
        locks = self.worker.machine or own_folder((self.data / "machine").absolute())
        places = {"cache": (self.data / self.worker.cache).absolute(), "machine": locks}
        return self.worker.model_copy(update=places)

    @property
    def host_settings(self) -> HostSettings:
        """The host's group with its folder's real place."""
        return self.host.model_copy(update={"data": (self.data / self.host.data).absolute()})


@dataclass(frozen=True)
class Loaded:
    """Settings, and where each value came from: {("registry", "port"): "environment WEIGHBRIDGE_REGISTRY__PORT"}."""

    settings: Settings
    origins: Mapping[Path_, str]
    file: Path | None


def load(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Settings:
    """Read all sources. `flags` maps dotted names to values; None is no flag. Raises ConfigError."""
    return load_with_origins(flags, config=config).settings


def load_with_origins(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Loaded:
    """As `load`, and tell the origin of every value that is not a default."""
    file = _find(config)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    sources: list[tuple[str, dict[Path_, Any]]] = [
        (f"file {file}", dict(_leaves(Settings, _read(file))) if file else {}),
        ("environment", _short() | dict(_leaves(Settings, _environment()))),
        ("flag", dict(_flag(name, value) for name, value in given.items())),
    ]
    values: dict[Path_, Any] = {}
    origins: dict[Path_, str] = {}
    for origin, leaves in sources:
        for path, value in leaves.items():
            values[path] = value
            origins[path] = f"environment {variable(path)}" if origin == "environment" else origin
    try:
        settings = Settings.model_validate(_nested(values))
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origins)) from None  # its text would repeat the values
    return Loaded(settings, origins, file)


def variable(path: Path_) -> str:
    """The environment variable of a setting."""
    return PREFIX + "__".join(path).upper()


def fields(model: type[BaseModel] = Settings, above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every leaf setting: its path and its pydantic FieldInfo."""
    for name, info in model.model_fields.items():
        if (group := _group(info.annotation)) is not None:
            yield from fields(group, (*above, name))
        else:
            yield (*above, name), info


def _find(config: Path | None) -> Path | None:
    """The file to read: the one asked for, which must be there, or ./weighbridge.toml if it is."""
    asked = config or (Path(os.environ[CONFIG]) if os.environ.get(CONFIG) else None)
    if asked is not None:
        return asked
    return FILE if FILE.is_file() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"file {file}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"file {file}: not TOML: {exc}") from exc


def _environment() -> dict[str, Any]:
    """What WEIGHBRIDGE_* variables say. A name with `__` is meant for us; a misspelt group is an error, not silence."""
    groups = {name.upper() for name in Settings.model_fields}
    for name in os.environ:
        head, nested, _ = name.removeprefix(PREFIX).partition("__")
        if name.startswith(PREFIX) and nested and head not in groups:
            raise ConfigError(f"environment {name}: no such group of settings{_nearest(head, groups)}")
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as exc:
        raise ConfigError(f"environment: {exc} (lists and tables are written as JSON)") from exc


def _short() -> dict[Path_, Any]:
    return {path: os.environ[name] for name, path in SHORT.items() if os.environ.get(name)}


def _flag(name: str, value: Any) -> tuple[Path_, Any]:
    """A flag's text for its setting: lists and tables are TOML, or words with commas; Pydantic reads the rest."""
    path = tuple(name.split("."))
    kind = next((get_origin(info.annotation) for known, info in fields() if known == path), None)
    if not isinstance(value, str) or kind not in (tuple, dict):
        return path, value
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, [word.strip() for word in value.split(",") if word.strip()] if kind is tuple else value


def _leaves(model: type[BaseModel], data: Any, above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Flatten nested groups, so that a table of values (labels) is replaced whole and never mixed from two sources."""
    for name, value in data.items():
        info = model.model_fields.get(name)
        group = _group(info.annotation) if info else None
        if group is not None and isinstance(value, Mapping):
            yield from _leaves(group, value, (*above, name))
        else:
            yield (*above, name), value


def _group(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(_group, get_args(annotation))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _nested(values: Mapping[Path_, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return tree


def _explain(exc: ValidationError, origins: Mapping[Path_, str]) -> str:
    known = {".".join(path) for path, _ in fields()} | set(Settings.model_fields)
    problems = []
    for error in exc.errors(include_url=False, include_context=False, include_input=False):
        loc = tuple(map(str, error["loc"]))
        name = ".".join(loc)
        nearest = [origin for path, origin in origins.items() if path == loc[: len(path)] or loc == path[: len(loc)]]
        rule = f"no such setting{_nearest(name, known)}" if error["type"] == "extra_forbidden" else error["msg"]
        problems.append(f"{', '.join(dict.fromkeys(nearest)) or 'default'}: {name}: {rule}")
    return "; ".join(problems)


def _nearest(name: str, known: set[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _reachable(host: str) -> str:
    """An address to call: a server that listens everywhere is called on loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)

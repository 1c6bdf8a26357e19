"""What every command gets: the settings, read once and late, and the client made from them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weighbridge.cli.target import Target
    from weighbridge.registry.client import Client
    from weighbridge.settings import Loaded, Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass
class Session:
    """One run of the CLI. `flags` maps dotted names of settings to the values given on the command line."""

    config: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    debug: bool = False
    quiet: bool = False
    """Whether nobody is to be told, or was told already, which registry this is."""

    @cached_property
    def loaded(self) -> Loaded:
        from weighbridge.settings import load_with_origins

        return load_with_origins(self.flags, config=self.config)

    @property
    def settings(self) -> Settings:
        return self.loaded.settings

    def override(self, **flags: Any) -> None:
        """Add a command's own flags (`registry__port=…`); None is no flag."""
        self.flags |= {name.replace("__", "."): value for name, value in flags.items() if value is not None}
        self.__dict__.pop("loaded", None)

    def logging(self) -> None:
        """Begin to log to stderr as the settings say."""
        from weighbridge import logs

        log = self.settings.log
        level = "debug" if self.debug else log.level
        logs.setup(level, log.format, secrets=logs.secrets_of(self.settings))

    @cached_property
    def target(self) -> Target:
        """The registry that this command means. Raises NotFound, NotPrivate."""
        from weighbridge.cli.target import choose

        return choose(self.loaded, Path.cwd())

    def client(self) -> Client:
        """A client of the registry that this command means; where that is not obvious it is said, beside the answer."""
        from weighbridge.cli import output
        from weighbridge.registry.client import DEFAULT_URL, Client

        target, token = self.target, self.settings.registry.token
        if target.note and target.url != DEFAULT_URL and not self.quiet:
            output.note(target.note)
            self.quiet = True
        return Client(target.url, token=token.get_secret_value() if token else None, data=target.data)

    def beside_up(self) -> Session:
        """The same with the settings of the `weighbridge up` whose data folder is at hand; itself where none is."""
        from weighbridge.registry.errors import NotFound

        try:
            data = self.target.data
        except NotFound:
            return self
        file = data / "weighbridge.toml" if data else None
        if self.config is not None or file is None or not file.is_file():
            return self
        return Session(config=file, flags=self.flags, debug=self.debug, quiet=True)


def of(context: typer.Context) -> Session:
    """The session of this run."""
    session = context.find_object(Session)
    assert session is not None, "the root callback makes it"
    session.quiet = session.quiet or bool(context.params.get("json"))
    return session


def split_setting(text: str) -> tuple[str, str]:
    """`registry.port=0` as a name and a text. Raises typer.BadParameter."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE, as in registry.port=0")
    return name.strip(), value.strip()


def parse_setting(text: str) -> tuple[str, Any]:
    """As `split_setting`, with the value as TOML reads it where it is TOML: `waves=[1, "50%"]`."""
    name, value = split_setting(text)
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value

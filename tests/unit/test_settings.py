"""Settings: precedence, errors that name source, field and rule, and secrets that stay secret."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from weighbridge import logs, settings
from weighbridge.cli import config as shown
from weighbridge.settings import ConfigError, load, load_with_origins


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests counts."""
    for name in os.environ:
        if name.startswith("WEIGHBRIDGE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root_logging() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source replaces the ones below it, value by value, and the origins say which one counted."""
    Path("weighbridge.toml").write_text("[registry]\nport = 1\nhost = '::1'\n[worker]\nconcurrency = 7\n")
    monkeypatch.setenv("WEIGHBRIDGE_REGISTRY__PORT", "2")
    monkeypatch.setenv("WEIGHBRIDGE_WORKER__CONCURRENCY", "8")
    loaded = load_with_origins({"registry.port": "3", "daemon.in_flight": None})

    found = loaded.settings
    assert (found.registry.port, found.worker.concurrency, found.registry.host) == (3, 8, "::1")
    assert found.daemon.in_flight == load({}, config=tmp_path / "weighbridge.toml").daemon.in_flight
    assert loaded.origins[("registry", "port")] == "flag"
    assert loaded.origins[("worker", "concurrency")] == "environment WEIGHBRIDGE_WORKER__CONCURRENCY"
    assert loaded.origins[("registry", "host")] == "file weighbridge.toml"


def test_a_table_of_values_is_never_mixed_from_two_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels from the environment replace those of the file: half of each would be a fleet that nobody named."""
    Path("weighbridge.toml").write_text("[host.labels]\nzone = 'a'\ngpu = 'yes'\n")
    monkeypatch.setenv("WEIGHBRIDGE_HOST__LABELS", '{"zone": "b"}')
    assert load().host.labels == {"zone": "b"}


def test_the_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config wins over WEIGHBRIDGE_CONFIG; a named file must be there."""
    (tmp_path / "a.toml").write_text("data = 'a'")
    (tmp_path / "b.toml").write_text("data = 'b'")
    monkeypatch.setenv("WEIGHBRIDGE_CONFIG", "b.toml")
    assert load().data == Path("b")
    assert load(config=tmp_path / "a.toml").data == Path("a")
    monkeypatch.setenv("WEIGHBRIDGE_CONFIG", "c.toml")
    with pytest.raises(ConfigError, match=r"file c\.toml: cannot be read: No such file"):
        load()


@pytest.mark.parametrize(
    ("flags", "file", "variables", "said"),
    [
        ({"registry.port": "99999"}, "", {}, "flag: registry.port: Input should be less than or equal to 65535"),
        ({}, "[regstry]\nport = 1", {}, "file weighbridge.toml: regstry: no such setting; did you mean registry?"),
        ({}, "[worker]\nconcurency = 1", {}, "worker.concurency: no such setting; did you mean worker.concurrency?"),
        ({}, "port = ", {}, "file weighbridge.toml: not TOML"),
        ({}, "", {"WEIGHBRIDGE_WORKER__CONCURRENCY": "many"}, "environment WEIGHBRIDGE_WORKER__CONCURRENCY: worker."),
        ({}, "", {"WEIGHBRIDGE_REGISTYR__PORT": "1"}, "environment WEIGHBRIDGE_REGISTYR__PORT: no such group"),
        ({}, "", {"WEIGHBRIDGE_POLICIES": "{"}, "environment: error parsing value for field"),
        ({}, "[[policies]]\nmin_bake = 'x'", {}, "file weighbridge.toml: policies.0.min_bake: Input should be a valid"),
        ({"storage.artifacts_prefix": "blobs"}, "", {}, "lies in the watched prefix: begin its name with a dot"),
        ({"storage.artifacts_prefix": ""}, "", {}, "needed where artifacts lie beside the checkpoints"),
    ],
)
def test_an_error_names_the_source_the_field_and_the_rule(
    flags: dict[str, str], file: str, variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it knows what to change and where."""
    Path("weighbridge.toml").write_text(file)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert said in str(caught.value)


def test_an_error_never_repeats_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a secret in the wrong place."""
    monkeypatch.setenv("WEIGHBRIDGE_REGISTRY__PORT", "hunter2-hunter2")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_artifacts_may_lie_outside_the_watched_prefix() -> None:
    """In another store, or beside the prefix, any name will do."""
    assert load({"storage.prefix": "runs", "storage.artifacts_prefix": "artifacts"}).storage.prefix == "runs"
    assert load({"storage.artifacts": "s3://other", "storage.artifacts_prefix": "x"}).storage.artifacts == "s3://other"


@pytest.mark.parametrize(
    ("flags", "below", "said"),
    [
        ({"url": "drops"}, ".weighbridge", True),
        ({"url": "drops", "artifacts": "drops"}, ".weighbridge", True),
        ({"url": "drops", "artifacts": "./drops/sub/../own"}, "own/.weighbridge", True),
        ({"url": "drops", "artifacts": "drops-of-ours"}, None, False),
        ({"url": "drops", "artifacts": "data/artifacts", "artifacts_prefix": ""}, None, False),
        ({"url": "s3://b"}, ".weighbridge", True),
        ({"url": "s3://b/runs", "artifacts": "s3://b/runs/own"}, "own/.weighbridge", True),
        ({"url": "s3://b/runs", "artifacts": "s3://b/runs-own"}, None, False),
        ({"url": "s3://b", "prefix": "runs", "artifacts_prefix": "own"}, "own", False),
        ({"url": "s3://b", "artifacts": "s3://other"}, None, False),
    ],
)
def test_it_is_said_where_publishers_can_write_to_artifacts(
    flags: dict[str, str], below: str | None, said: bool
) -> None:
    """However the places are written; a neighbour that begins with the same letters is another place."""
    storage = load({f"storage.{name}": value for name, value in flags.items()}).storage
    assert storage.artifacts_below == below
    assert (storage.exposed is not None) == said


def test_artifacts_have_keys_of_their_own() -> None:
    """What is not set for them is as for the watched bucket."""
    given = {"url": "s3://b", "artifacts": "s3://own", "s3.endpoint_url": "http://127.0.0.1:9", "s3.access_key": "a"}
    given |= {"s3.secret_key": "b", "artifacts_s3.access_key": "c", "artifacts_s3.secret_key": "d"}
    storage = load({f"storage.{name}": value for name, value in given.items()}).storage
    options = storage.artifacts_options
    assert options.endpoint_url == "http://127.0.0.1:9"
    assert options.access_key is not None
    assert options.access_key.get_secret_value() == "c"


def test_a_kubernetes_service_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service named weighbridge-registry puts WEIGHBRIDGE_REGISTRY_PORT=tcp://… into every pod."""
    monkeypatch.setenv("WEIGHBRIDGE_REGISTRY_PORT", "tcp://10.0.0.1:8400")
    assert load().registry.port == 8400


def test_the_short_names_of_the_client_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEIGHBRIDGE_URL and WEIGHBRIDGE_TOKEN say where the registry is and who calls, for the CLI too."""
    monkeypatch.setenv("WEIGHBRIDGE_URL", "http://registry:1")
    monkeypatch.setenv("WEIGHBRIDGE_TOKEN", "wb_secret")
    found = load()
    assert found.registry_url == "http://registry:1"
    assert found.registry.token is not None
    assert found.registry.token.get_secret_value() == "wb_secret"


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ({}, "http://127.0.0.1:8400"),
        ({"registry.host": "0.0.0.0", "registry.port": "1"}, "http://127.0.0.1:1"),
        ({"registry.host": "::1"}, "http://[::1]:8400"),
        ({"registry.tls_certificate": "c.pem"}, "https://127.0.0.1:8400"),
        ({"registry.url": "https://w.example"}, "https://w.example"),
    ],
)
def test_where_clients_reach_the_registry(flags: dict[str, str], url: str) -> None:
    """From its own address, unless it says otherwise."""
    assert load(flags).registry_url == url


def test_relative_places_lie_in_the_data_folder(tmp_path: Path) -> None:
    """The database, the cache and the host's folder move together; absolute places and PostgreSQL stay."""
    found = load({"data": "d"})
    assert found.database_url.get_secret_value() == f"sqlite:///{tmp_path}/d/weighbridge.db"
    assert found.worker_settings.cache == tmp_path / "d" / "worker-cache"
    assert found.host_settings.data == tmp_path / "d" / "host"
    for url in ("postgresql+psycopg://u:p@h/n", "sqlite:////abs/x.db", "sqlite://"):
        assert load({"registry.database": url}).database_url.get_secret_value() == url


def test_flags_of_lists_and_tables() -> None:
    """As TOML, or words with commas."""
    found = load({"worker.queues": "cpu, gpu", "host.factories": '["a.b:*"]', "host.labels": '{zone = "a"}'})
    assert (found.worker.queues, found.host.factories) == (("cpu", "gpu"), ("a.b:*",))
    assert found.host.labels == {"zone": "a"}


def test_every_setting_says_what_it_is() -> None:
    """A sentence each: `weighbridge config` and the reference print it."""
    assert [path for path, info in settings.fields() if not (info.description or "").endswith((".", ")"))] == []


def test_secrets_are_hidden_and_urls_keep_all_but_their_password() -> None:
    """What is printed can be pasted into a ticket."""
    loaded = load_with_origins(
        {
            "registry.database": "postgresql+psycopg://me:hunter2@db/w?sslpassword=hunter2",
            "broker.url": "redis://:hunter2@b:1/0",
            "storage.s3.secret_key": "hunter2",
            "registry.token": "hunter2",
        }
    )
    rows = {row.name: row.value for row in shown.rows_of(loaded)}
    assert rows["registry.database"] == "postgresql+psycopg://me:***@db/w"
    assert rows["broker.url"] == "redis://:***@b:1/0"
    assert rows["storage.s3.secret_key"] == rows["registry.token"] == "(hidden)"
    assert "hunter2" not in str(list(shown.rows_of(loaded))) + repr(loaded.settings)


@pytest.mark.usefixtures("root_logging")
@pytest.mark.parametrize("format", ["human", "json"])
def test_no_line_of_a_log_holds_a_secret(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known secrets and what looks like one are taken out of messages, extra fields and tracebacks."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    found = load({"storage.s3.secret_key": "hunter2-key", "broker.url": "redis://:hunter2-pass@b/0"})
    logs.setup("info", format, secrets=logs.secrets_of(found))
    log = logging.getLogger("weighbridge.test")
    try:
        raise OSError("cannot reach redis://:hunter2-pass@b/0")
    except OSError:
        log.exception("signing with %s failed", "hunter2-key", extra={"url": "postgresql://u:hunter3@h/x"})
    log.info("Authorization: Bearer wb_abcdefgh12345 &X-Amz-Signature=abc123&b=1")

    text = stream.getvalue()
    assert "cannot reach redis" in text
    for secret in ("hunter", "wb_abcdefgh12345", "abc123"):
        assert secret not in text
    if format == "json":
        first, second = map(json.loads, text.splitlines())
        assert (first["level"], first["logger"], first["url"]) == (
            "error",
            "weighbridge.test",
            "postgresql://u:***@h/x",
        )
        assert "Traceback" in first["exception"]
        assert second["message"].endswith("&b=1")


@pytest.mark.usefixtures("root_logging")
def test_a_message_is_one_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's name with a line end or an escape in it writes no line of its own and steers no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    logs.setup("info", "human")
    logging.getLogger("weighbridge.test").info("seen %s", "a\n13:08:01 ERROR forged\x1b[2J")
    assert stream.getvalue().count("\n") == 1
    assert "seen a\\n13:08:01 ERROR forged\\x1b[2J" in stream.getvalue()

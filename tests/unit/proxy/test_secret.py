"""The tenant secret: given, read from a file, or created once for all proxies of a user."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokencake.protocol.tenancy import SecretError
from tokencake_cli import main as cli
from tokencake_proxy.secret import tenant_secret


@pytest.fixture
def environ(tmp_path):
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def test_a_missing_secret_is_created_readable_for_its_owner_only(environ, tmp_path):
    secret = tenant_secret(environ)

    file = tmp_path / "state" / "tokencake" / "tenant-secret"
    assert len(secret) == 64
    assert tenant_secret(environ) == secret == file.read_bytes().strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["tenant-secret"]


def test_proxies_that_start_at_the_same_time_share_one_secret(environ):
    with ThreadPoolExecutor(16) as threads:
        assert len(set(threads.map(lambda _: tenant_secret(environ), range(16)))) == 1


def test_a_file_overrides_the_variables_and_these_the_default(environ, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("the secret of file one\n")
    two.write_text("the secret of file two\n")
    environ["TOKENCAKE_TENANT_SECRET_FILE"] = str(two)

    assert tenant_secret(environ) == b"the secret of file two"
    environ["TOKENCAKE_TENANT_SECRET"] = "the secret of a variable"
    assert tenant_secret(environ) == b"the secret of a variable"
    assert tenant_secret(environ, one) == b"the secret of file one"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("text", ["", "short", "\xff" * 3])
def test_an_invalid_secret_is_refused_with_the_way_out(environ, tmp_path, text):
    (tmp_path / "bad").write_bytes(text.encode("latin-1"))
    with pytest.raises(SecretError, match="bad"):
        tenant_secret(environ, tmp_path / "bad")
    with pytest.raises(SecretError, match="TOKENCAKE_TENANT_SECRET"):
        tenant_secret(environ, tmp_path / "missing")


def test_a_state_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SecretError, match="file/tokencake"):
        tenant_secret({"XDG_STATE_HOME": str(tmp_path / "file")})


def test_the_command_line_refuses_to_start_without_a_secret(tmp_path, capsys):
    flags = ["proxy", "--upstream", "http://127.0.0.1:1", "--tenants", "--tenant-secret-file", str(tmp_path / "none")]
    assert cli.main(flags) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err

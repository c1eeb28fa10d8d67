"""``ssdtrain doctor`` measures, judges, exits with 0 only if every directory is usable."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ssdtrain_plugin.cli import app
from ssdtrain_plugin.doctor import EXTENT_BYTES, diagnosis, examine
from ssdtrain_plugin.doctor.rendering import directory_table
from ssdtrain_plugin.storage.extent_file import ExtentFile
from ssdtrain_plugin.storage.probe import DirectoryReport
from ssdtrain_plugin.units import GIB, MIB, format_bytes


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_a_usable_directory(tmp_path):
    result = run(tmp_path, "--size", "32 MiB")
    assert result.exit_code == 0, result.output
    for text in ("file system", "O_DIRECT", "O_TMPFILE", "free space", "write", "read", "posix", "usable", "B/s"):
        assert text in result.stdout
    assert os.listdir(tmp_path) == []


def test_json_holds_the_report(tmp_path):
    result = run(tmp_path, "--size", "32MiB", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["is_usable"] is True
    (found,) = report["directories"]
    assert found["path"] == str(tmp_path)
    assert found["engine"] == "posix"
    assert found["bandwidth"]["nbytes"] == 32 * MIB
    assert found["bandwidth"]["threads"] == 4
    assert min(found["bandwidth"][f"{key}_bytes_per_second"] for key in ("first_write", "write", "read")) > 0
    assert found["directory"]["is_writable"] is True


@pytest.mark.parametrize("as_json", [False, True])
def test_an_unusable_directory_fails_with_one_screen(tmp_path, as_json):
    result = run(tmp_path / "missing", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "no such directory" in result.output
    assert "Traceback" not in result.output
    assert as_json or len(result.output.splitlines()) < 24
    if as_json:
        assert json.loads(result.stdout)["is_usable"] is False
    else:
        assert "hint:" in result.stderr


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    result = run(path)
    assert result.exit_code == 1
    assert "not a directory" in result.output


def test_one_bad_directory_fails_all_but_every_one_is_looked_at(tmp_path):
    result = run(tmp_path / "missing", tmp_path, "--size", "16 MiB")
    assert result.exit_code == 1
    assert "no such directory" in result.stderr
    assert "usable:" in result.stdout or "usable, with" in result.stdout


@pytest.mark.parametrize("size", ["much", "0", "-1", "5 parsecs"])
def test_a_size_that_is_none_is_a_usage_error(tmp_path, size):
    result = run(tmp_path, "--size", size)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_without_a_path_it_says_so():
    assert run().exit_code == 2


def test_a_path_with_markup_is_printed_as_it_is(tmp_path):
    path = tmp_path / "[bold]x[red]"
    path.mkdir()
    assert "[bold]x[red]" in run(path, "--size", "16 MiB").stdout.replace("\n", "")


def test_the_size_is_clipped_to_a_quarter_of_the_free_space(tmp_path, monkeypatch):
    def little(path):
        return DirectoryReport(path, "ext4", True, True, True, "works", 512, 200 * MIB, 300 * MIB)

    monkeypatch.setattr(diagnosis, "probe_directory", little)
    assert examine(str(tmp_path), nbytes=1 << 40).bandwidth.nbytes == 3 * EXTENT_BYTES
    assert examine(str(tmp_path), nbytes=1).bandwidth.nbytes == EXTENT_BYTES


def test_the_default_of_disk_bytes_is_that_of_the_extent_file(tmp_path, monkeypatch):
    report = DirectoryReport(str(tmp_path), "ext4", True, True, False, "", 1, 200 * GIB, 300 * GIB)
    monkeypatch.setattr(diagnosis, "probe_directory", lambda path: report)
    file = ExtentFile(report, None)
    limit_bytes = file.limit_bytes
    file.close()
    facts = {finding.name: finding.fact for finding in examine(str(tmp_path), nbytes=1).findings}
    assert facts["free space"].endswith(f"would be {format_bytes(limit_bytes)}")


def test_progress_covers_every_phase(tmp_path):
    seen = []
    examine(str(tmp_path), nbytes=2 * EXTENT_BYTES, progress=lambda *step: seen.append(step))
    assert [phase for phase, _, _ in seen] == ["first write"] * 2 + ["write"] * 2 + ["read"] * 2
    assert [done for _, done, _ in seen] == [EXTENT_BYTES * count for count in range(1, 7)]
    assert {total for _, _, total in seen} == {6 * EXTENT_BYTES}


def test_bytes_that_come_back_changed_are_a_problem(tmp_path, monkeypatch):
    real = os.preadv

    def corrupts(fd, buffers, offset):
        count = real(fd, buffers, offset)
        if count == EXTENT_BYTES:
            memoryview(buffers[0]).cast("B")[0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", corrupts)
    found = examine(str(tmp_path), nbytes=EXTENT_BYTES)
    assert not found.is_usable
    assert "came back changed" in found.problem


def test_a_page_cache_directory_is_usable_with_reservations(tmp_path, monkeypatch):
    real = os.open

    def no_direct(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", no_direct)
    found = examine(str(tmp_path), nbytes=EXTENT_BYTES)
    assert found.is_usable
    assert found.verdict.startswith("usable, with reservations")
    assert any("page cache" in advice for advice in found.advices)


def test_the_command_line_does_not_import_torch_itself():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('ssdtrain_plugin'); package.__path__ = ['ssdtrain_plugin']\n"
        "sys.modules['ssdtrain_plugin'] = package\n"
        "import ssdtrain_plugin.cli\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


MODEL = "layers: 2\nhidden: 64\nheads: 4\nsequence: 128\nmicro_batch: 2\ntflops: 0.001\n"


def test_the_machine_is_looked_at_too(tmp_path):
    result = run(tmp_path, "--size", "16 MiB")
    for text in ("this machine", "GPUs", "host memory", "huge pages", "memlock limit", "file limits", "io_uring"):
        assert text in result.stdout
    for text in ("drive", "NUMA node", "GPUDirect Storage", "O_DIRECT"):
        assert text in result.stdout


def test_a_model_gets_a_prediction_that_says_it_is_one(tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    result = run(tmp_path, "--size", "16 MiB", "--model", tmp_path / "model.yaml")
    assert result.exit_code == 0, result.output
    for text in ("prediction, not a measurement", "saved for backward", "needed write", "policy: all", "advice:"):
        assert text in result.stdout


def test_json_holds_machine_and_prediction(tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    report = json.loads(run(tmp_path, "--size", "16 MiB", "--model", tmp_path / "model.yaml", "--json").stdout)
    assert {finding["name"] for finding in report["machine"]} >= {"host memory", "io_uring"}
    assert report["prediction"]["shape"]["layers"] == 2
    assert report["prediction"]["num_directories"] == 1
    assert all(set(finding) == {"name", "fact", "advice"} for finding in report["directories"][0]["findings"])


def test_without_a_model_or_a_usable_directory_nothing_is_predicted(tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    assert json.loads(run(tmp_path, "--size", "16 MiB", "--json").stdout)["prediction"] is None
    report = json.loads(run(tmp_path / "missing", "--model", tmp_path / "model.yaml", "--json").stdout)
    assert report["prediction"] is None


@pytest.mark.parametrize("text", ["layers: many", "strange: 1", "- 1", "{", ""])
def test_a_model_that_is_none_is_a_usage_error(tmp_path, text):
    (tmp_path / "model.yaml").write_text(text)
    result = run(tmp_path, "--model", tmp_path / "model.yaml")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "model.yaml" in result.output.replace("\n", "")


def test_markup_in_what_was_found_is_printed_as_it_is(tmp_path):
    odd = diagnosis.Finding("[bold]name", "[red]fact", "[green]advice")
    found = diagnosis.Diagnosis("[blue]path", True, None, None, None, "posix", "", (odd,), "usable")
    console = Console(width=200, file=io.StringIO())
    console.print(directory_table(found))
    text = console.file.getvalue()
    assert all(piece in text for piece in ("[blue]path", "[bold]name", "[red]fact", "[green]advice"))

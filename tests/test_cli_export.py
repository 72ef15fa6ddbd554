"""Export and verify from the command line, on a tiny model that was really solved."""

from __future__ import annotations

from pathlib import Path

import pytest

from makeweight.cli import main
from makeweight.pipeline import quantize
from tests.runs import a_text, small
from tests.test_cli import refused
from tests.tiny import tiny_folder


def test_export_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_folder("llama", tmp_path / "model"), a_text(tmp_path / "words.txt")
    quantize(small(model, tmp_path / "out", text, method="rtn"))
    monkeypatch.setattr("rich.console.Console.width", 200)
    capsys.readouterr()

    assert main(["export", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("compressed-tensors", "dense", "exactly", "transformers"))
    assert next(line for line in table.splitlines() if " awq " in line).split()[1] == "no:"
    assert not (tmp_path / "out-dense").exists()

    assert main(["export", str(tmp_path / "out"), "--format", "dense"]) == 0
    printed = capsys.readouterr().out
    assert "equal" in printed and f"Written to {tmp_path / 'out-dense'}" in printed.splitlines()
    for folder in ("out", "out-dense"):
        assert main(["verify", str(tmp_path / folder)]) == 0
        assert "byte for byte" in capsys.readouterr().out

    file = tmp_path / "out-dense" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"<s>", b"<z>", 1))
    assert "tokenizer.json is damaged" in refused(capsys, "verify", str(tmp_path / "out-dense"))
    assert "did you mean 'dense'" in refused(capsys, "export", str(tmp_path / "out"), "--format", "dens")
    for option in ("--push-to-hub", "--out"):
        assert "name it with --format" in refused(capsys, "export", str(tmp_path / "out"), option, "me")
    for inside in (tmp_path / "out", tmp_path / "out" / "deep" / ".." / "more"):
        assert "lies in the folder that is exported" in refused(
            capsys, "export", str(tmp_path / "out"), "--format", "dense", "--out", str(inside)
        )
    wrong = refused(capsys, "export", str(tmp_path / "out"), "--format", "dense", "--out", str(text))
    assert "cannot be made a folder" in wrong


def test_push_to_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_folder("llama", tmp_path / "model"), a_text(tmp_path / "words.txt")
    quantize(small(model, tmp_path / "out", text, method="rtn"))
    pushed: list[tuple[str, str]] = []
    replaced: list[list[str] | None] = []

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            if name.startswith("nobody"):
                raise OSError("401 Unauthorized: log in first.\nlong details")
            return f"https://hub/{name}"

        def upload_folder(
            self, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str] | None
        ) -> None:
            replaced.append(delete_patterns)
            pushed.append((repo_id, folder_path.name))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    line = ["export", str(tmp_path / "out"), "--format", "dense,compressed-tensors", "--push-to-hub"]
    assert main([*line, "me/tiny"]) == 0
    assert pushed == [("me/tiny-dense", "out-dense"), ("me/tiny-compressed-tensors", "out-compressed-tensors")]
    assert replaced == [["*.safetensors", "*.safetensors.index.json"]] * 2, "weights of an earlier upload go"
    assert "https://hub/me/tiny-dense" in capsys.readouterr().out
    assert main([*line, "nobody/tiny"]) == 2
    says = capsys.readouterr().err
    assert "401 Unauthorized: log in first" in says and "long details" not in says

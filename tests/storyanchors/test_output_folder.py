import pytest

from storyanchors.output_folder import check_output_folder, output_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, text):
    with output_folder(folder, made_with="run.json") as temporary:
        (temporary / "run.json").write_text(text)
        assert not (folder / "run.json").exists() or (folder / "run.json").read_text() != text


def test_a_folder_appears_when_it_is_complete_and_replaces_an_earlier_result(tmp_path):
    write(tmp_path / "deep" / "out", "first")
    (tmp_path / "deep" / "out" / "old.png").write_text("")
    write(tmp_path / "deep" / "out", "second")
    assert names(tmp_path / "deep" / "out") == ["run.json"]
    assert (tmp_path / "deep" / "out" / "run.json").read_text() == "second"
    assert names(tmp_path / "deep") == ["out"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "first")
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out", made_with="run.json") as temporary:
        (temporary / "run.json").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "run.json").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_foreign_folders_and_files_are_refused_before_the_work(tmp_path):
    (tmp_path / "mine").mkdir()
    check_output_folder(tmp_path / "mine", made_with="run.json")  # an empty folder is no loss
    (tmp_path / "mine" / "diary.txt").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        check_output_folder(tmp_path / "mine", made_with="run.json")
    for path in (tmp_path / "mine" / "diary.txt", tmp_path / "mine" / "diary.txt" / "out"):
        with pytest.raises(OSError, match="is a file"):
            check_output_folder(path, made_with="run.json")
    assert names(tmp_path / "mine") == ["diary.txt"]

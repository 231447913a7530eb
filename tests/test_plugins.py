"""Plug-ins: a user's files and modules in every command and process."""

import os
import shutil
import textwrap

import pytest
from launching import finish, start

from fastokd import plugins
from fastokd.cli import main
from fastokd.errors import ConfigError
from fastokd.export import load_student
from fastokd.methods import get_method
from fastokd.models import create_student
from fastokd.train.config import TrainConfig
from fastokd.train.config_files import completed
from fastokd.train.run_folder import RunFolder

METHOD = '''
"""A method of a user: the baseline's loss under another name."""
from dataclasses import replace
from fastokd.methods import get_method, register_method

METHOD = replace(get_method("baseline"), name="{name}")
register_method("{name}", __name__)
'''
NETWORK = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU())
            self.fc = nn.Linear(8, num_classes)

        def forward(self, images):
            return self.fc(self.second(self.first(images)).mean((2, 3)))
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def write_method(path, name):
    return write(path, METHOD.format(name=name))


def run(*arguments, **environment):
    return finish(start(["-m", "fastokd", *arguments], **environment))


def save_run(folder, *plugin):
    """A run folder with these plug-ins in its configuration."""
    folder.mkdir(parents=True)
    run_folder = RunFolder(folder)
    run_folder.save_config(TrainConfig(plugin=plugin))
    return run_folder


def test_plugin_file_is_loaded_once_and_stored_absolute(tmp_path, monkeypatch):
    file = write_method(tmp_path / "plug_once.py", "plug-once")
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n")
    monkeypatch.chdir(tmp_path)
    assert plugins.load_plugins(["plug_once.py", str(file)]) == (str(file), str(file))
    assert get_method("plug-once").name == "plug-once"
    assert (tmp_path / "imports").read_text() == "x"
    config = completed(TrainConfig(method="plug-once"))
    assert config.plugin == (str(file),)
    assert completed(TrainConfig()).plugin == ()


def test_plugin_module_is_stored_with_its_folder(tmp_path, monkeypatch):
    write_method(tmp_path / "plug_package" / "method.py", "plug-module")
    monkeypatch.chdir(tmp_path)
    stored = plugins.load_plugins(["plug_package.method"])
    assert stored == (f"plug_package.method@{tmp_path}",)
    assert get_method("plug-module").name == "plug-module"


def test_missing_plugin_of_run_is_named_and_replaceable(tmp_path):
    run_folder = save_run(tmp_path / "run", "/gone/plug_moved.py", "plug_gone.sub@/gone")
    with pytest.raises(ConfigError) as error:
        run_folder.load_config()
    assert str(error.value) == (
        f"plug-in /gone/plug_moved.py of {tmp_path / 'run'}: there is no such file;"
        " pass --plugin PATH/plug_moved.py"
    )
    new = write_method(tmp_path / "here" / "plug_moved.py", "plug-moved")
    plugins.load_plugins([str(new)])
    with pytest.raises(ConfigError, match=r"no module 'plug_gone' in /gone.*plug_gone.sub@FOLDER"):
        run_folder.load_config()
    write_method(tmp_path / "there" / "plug_gone" / "sub.py", "plug-gone")
    plugins.load_plugins([f"plug_gone.sub@{tmp_path / 'there'}"])
    assert run_folder.load_config().plugin == (str(new), f"plug_gone.sub@{tmp_path / 'there'}")


def test_other_plugin_of_the_same_name_is_refused(tmp_path):
    one = write_method(tmp_path / "a" / "plug_twin.py", "plug-twin-a")
    other = write_method(tmp_path / "b" / "plug_twin.py", "plug-twin-b")
    same = shutil.copy(one, write(tmp_path / "c" / "plug_twin.py", ""))
    first = save_run(tmp_path / "first", str(one))
    first.load_config()
    with pytest.raises(ConfigError, match="another file of that name, is loaded"):
        save_run(tmp_path / "second", str(other)).load_config()
    assert save_run(tmp_path / "third", str(same)).load_config().plugin == (str(one),)


def test_code_inside_a_run_folder_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = write(tmp_path / "run" / "evil.py", "raise AssertionError")
    module = f"evil@{tmp_path / 'run'}"
    for text in (str(inside), "run/evil.py", "../evil.py", module, "evil@run", "evil:main@."):
        folder = tmp_path / "run"
        RunFolder(folder).save_config(TrainConfig(plugin=(text,)))
        with pytest.raises(ConfigError, match="code that came with a run is not loaded"):
            RunFolder(folder).load_config()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plug_raises", "x = 1\n\nx / 0\n", r"ZeroDivisionError: .*plug_raises.py, line 3\)"),
        ("plug_syntax", "x = (\n", r"SyntaxError: .*plug_syntax.py, line 1\)"),
        ("plug_exits", "raise SystemExit(3)\n", "ends the program when it is imported"),
        ("json", "", "another module is named 'json'; rename"),
    ],
)
def test_plugin_that_fails_is_one_line(tmp_path, name, text, message, capsys):
    file = write(tmp_path / f"{name}.py", text)
    assert main(["show", "ahbf", "--plugin", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastokd: plug-in {file}")
    assert error.count("\n") == 1
    with pytest.raises(ConfigError, match=message):
        plugins.load_plugins([str(file)])


def test_absent_plugin_and_guarded_registration_are_explained(tmp_path, capsys):
    assert main(["methods", "--plugin", str(tmp_path / "absent.py")]) == 2
    assert "absent.py: there is no such file; check the path" in capsys.readouterr().err
    text = 'if __name__ == "__main__":\n    print("never")\n'
    file = write(tmp_path / "plug_silent.py", text)
    assert main(["show", "plug-silent", "--plugin", str(file)]) == 2
    assert f"plug-in {file} registers nothing when it is imported" in capsys.readouterr().err
    assert main(["show", "zebra"]) == 2
    assert "for a method of a plug-in, pass --plugin FILE.py" in capsys.readouterr().err


def test_installed_plugins_are_found_by_entry_point(tmp_path):
    """A package with one plug-in that works, as a module and as a function, and one that fails."""
    write_method(tmp_path / "plug_installed" / "method.py", "plug-installed")
    write(
        tmp_path / "plug_installed" / "more.py",
        """
        from fastokd.methods import register_method

        def register():
            register_method("plug-by-function", "plug_installed.method")
        """,
    )
    write(tmp_path / "plug_installed" / "broken.py", "import plug_not_there\n")
    info = tmp_path / "plug_installed-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: plug-installed\nVersion: 1.0\n")
    write(
        info / "entry_points.txt",
        """\
        [fastokd.plugins]
        method = plug_installed.method
        more = plug_installed.more:register
        broken = plug_installed.broken
        """,
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    code, output, errors = run("show", "plug-installed", **path)
    assert (code, "CE(branch1, target)" in output) == (0, True), errors
    assert "plug-in plug_installed.broken of the package plug-installed" in errors
    assert "plug-by-function" in run("methods", **path)[1]
    options = ["--data", "digits", "--model", "resnet8", "--epochs", 1, "--quiet"]
    options += ["--batch-size", 512, "--out", tmp_path / "run"]
    code, _, errors = run("train", "--method", "plug-installed", *options, **path)
    assert code == 0, errors
    (tmp_path / "plug_installed").rename(tmp_path / "elsewhere")
    code, _, errors = run("eval", tmp_path / "run")  # the package is not installed there
    assert code == 2
    assert f"plug-in plug_installed.method@{tmp_path} of {tmp_path / 'run'}" in errors


def test_plugin_works_in_two_processes_and_after_a_move(tmp_path):
    file = write_method(tmp_path / "old" / "plug_ranks.py", "plug-ranks")
    out = tmp_path / "run"
    small = ["--model", "resnet8", "--batch-size", 256, "--epochs", 1, "--device", "cpu", "--quiet"]
    train = ["train", "--data", "digits", "--method", "plug-ranks", *small, "--out", out]
    code, _, errors = run(*train, "--plugin", file, "--gpus", 2)
    assert code == 0, errors
    code, output, errors = run("eval", out)
    assert (code, "branch1 (student)" in output) == (0, True), errors
    new = tmp_path / "new" / "plug_ranks.py"
    new.parent.mkdir()
    file.rename(new)
    code, _, errors = run("export", out)
    assert (code, f"plug-in {file} of {out}: there is no such file" in errors) == (2, True)
    resume = ["train", "--resume", out, "--epochs", 2, "--quiet"]
    code, _, errors = run(*resume, "--plugin", new)
    assert code == 0, errors
    assert RunFolder(out).config_path.read_text().count(str(new)) == 1
    code, output, errors = run("export", out)  # from the new path in config.yaml
    assert code == 0, errors


def test_script_with_own_method_sweeps(tmp_path):
    """A program that calls ``main`` is a plug-in of the processes that it starts."""
    script = write_method(tmp_path / "plug_script.py", "plug-script")
    with open(script, "a", encoding="utf-8") as file:
        file.write(
            'if __name__ == "__main__":\n'
            "    from fastokd.cli import main\n    raise SystemExit(main())\n"
        )
    out = tmp_path / "sweep"
    points = ["--set", "method=plug-script,baseline", "--set", "model=resnet8", "--set", "epochs=1"]
    sweep = ["sweep", "--data", "digits", *points, "--out", out]
    code, output, errors = finish(start([script, *sweep]))
    assert code == 0, f"{output}\n{errors}"
    folders = sorted(path.name for path in (out / "runs").iterdir())
    assert folders == ["method-baseline-seed0", "method-plug-script-seed0"]
    texts = [(out / "runs" / name / "config.yaml").read_text() for name in folders]
    assert [str(script) in text for text in texts] == [False, True]
    code, output, errors = run("compare", *(out / "runs" / name for name in folders))
    assert code == 0, errors
    assert "plug-script" in output


def test_own_network_of_a_record_is_not_imported(tmp_path, monkeypatch, capsys):
    write(tmp_path / "plug_nets.py", NETWORK)
    monkeypatch.chdir(tmp_path)
    run_folder = tmp_path / "run"
    train = "train --data digits --method baseline --epochs 1 --batch-size 512 --quiet --out run"
    assert main([*train.split(), "--model", "plug_nets:Net"]) == 0
    assert f"plug_nets@{tmp_path}" in (run_folder / "config.yaml").read_text()
    assert main(["export", "run"]) == 0
    code, _, errors = run("eval", run_folder / "export", "--data", "digits")
    assert code == 4
    assert "plug_nets:Net of the module plug_nets; if you trust that code" in errors
    student, record = load_student(run_folder / "export")  # this process has imported the module
    assert type(student).__name__ == "Net"
    assert record["architecture"]["name"] == "plug_nets:Net"


def test_own_network_errors_name_the_fix(tmp_path, monkeypatch):
    write(tmp_path / "plug_wrong.py", "def number(num_classes): return 3\nvalue = 1\n")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("plug_wrong:number", "returns int, not a torch.nn.Module"),
        ("plug_wrong:value", "has no function or class 'value'"),
        ("plug_absent:Net", "neither a library nor a module.*--plugin FILE.py"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_student(name, 10)

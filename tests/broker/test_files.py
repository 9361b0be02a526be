"""What of a user's folder travels with code, what is refused with the mend, and how it arrives."""

import asyncio
import gc
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mqserve.broker.errors import BadValue, NotEncodable
from mqserve.broker.files import manifest, walk
from mqserve.broker.files.folders import Folders, folders_of, name_of_file, with_root
from mqserve.broker.files.import_errors import mend_of, shadowed
from mqserve.broker.files.manifest import File, Files, Folder, Manifest, read_folders
from mqserve.broker.files.roots import check_root, modules_in, root_of_file
from mqserve.broker.files.transfer import Restored, restore_files, save_files
from mqserve.broker.files.walk import LeftOut
from mqserve.broker.store import Store
from mqserve.broker.store_keys import CODE_TTL_S, StoreKeys
from mqserve.broker.values.backend_code import Packed, pack_backend, save
from mqserve.broker.values.code import files_of
from mqserve.broker.values.main_module import RunFile
from mqserve.broker.values.signing import Signer


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def named(files: Files) -> list[str]:
    return [file.path for file in files.manifest.folders[0].files]


def read(folder: Path) -> Files:
    return read_folders({folder: ("",)}, ())


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MQSERVE_CODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module in a folder of its own."""
    write(tmp_path / "code", travelling_mod_DOT_py="LIMIT = 3\nclass Model:\n    def __call__(self, request):\n        return LIMIT\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield importlib.import_module("travelling_mod")
    sys.modules.pop("travelling_mod", None)


# What travels.


def test_secrets_environments_and_caches_never_travel(tmp_path: Path) -> None:
    for name in (
        "app.py", "data/rates.csv", ".env", ".env.local", "tls.pem", "id_rsa", ".git/config", "venv/lib/x.py", "env/pyvenv.cfg",
        "env/lib.py",
        "__pycache__/app.cpython-311.pyc", ".mypy_cache/x", "node_modules/x.js", ".ssh/config", "prod.env", "credentials-prod.json",
        "service-account.json", "release.keystore", "main.tfstate", "main.tfstate.backup", ".azure/tokens", ".terraform/x",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "innocent.txt").symlink_to(tmp_path / ".env")
    (tmp_path / ".mqserveignore").write_text("!.env\n!tls.pem\n")
    assert named(read(tmp_path)) == [".mqserveignore", "app.py", "data/rates.csv"]


def test_ignore_files_mean_what_they_mean_to_git_and_ours_has_the_last_word(tmp_path: Path) -> None:
    for name in (
        "app.py",
        "a.log",
        "keep.log",
        "logs/b.log",
        "build/x.py",
        "sub/build/y.py",
        "sub/only.here",
        "only.here",
        "deep/a/b/model.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".gitignore").write_text("# a comment\n*.log\n/build/\nsub/only.here\ndeep/**/model.bin\n")
    (tmp_path / ".mqserveignore").write_text("!keep.log\n")
    assert named(read(tmp_path)) == [".gitignore", ".mqserveignore", "app.py", "keep.log", "only.here", "sub/build/y.py"]


def test_ours_has_the_last_word_over_every_gitignore_also_over_deeper_ones(tmp_path: Path) -> None:
    write(tmp_path, sub__model_DOT_py="x", sub__deep__model_DOT_py="x", sub__deep__other_DOT_py="x", built__gen_DOT_py="x")
    write(tmp_path, _DOT_gitignore="built/\n", sub___DOT_gitignore="*.py\n", _DOT_mqserveignore="!model.py\n!/built\n")
    assert [name for name in named(read(tmp_path)) if name.endswith(".py")] == ["sub/model.py", "sub/deep/model.py", "built/gen.py"]
    write(tmp_path, sub__deep___DOT_mqserveignore="model.py\n")
    assert "sub/deep/model.py" not in named(read(tmp_path))


def test_a_line_that_is_no_pattern_is_ignored_as_git_does(tmp_path: Path) -> None:
    write(tmp_path, app_DOT_py="x", notes_DOT_log="x", _DOT_gitignore="[z-a]\n*.log\n")
    assert named(read(tmp_path)) == [".gitignore", "app.py"]


def test_links_to_themselves_to_nowhere_and_files_that_vanish_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, app_DOT_py="x", vanishing_DOT_py="x")
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone.py")
    os.mkfifo(tmp_path / "pipe.py")
    look_at = walk._look_at

    def vanish(entry: "os.DirEntry[str]") -> Any:
        if entry.name == "vanishing.py":
            os.unlink(entry.path)
        return look_at(entry)

    monkeypatch.setattr(walk, "_look_at", vanish)
    assert named(read(tmp_path)) == ["app.py"]


@pytest.mark.parametrize(
    "target", [".aws/credentials", ".config/tool/hosts.yml", "project/.env", "project/.git/config", "keys/service-account-7.json"]
)
def test_a_link_to_a_secret_stays_behind_whatever_its_own_name(tmp_path: Path, target: str) -> None:
    write(tmp_path, project__app_DOT_py="x", shared__common_DOT_py="y = 1")
    write(tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("token")
    (tmp_path / "project" / "settings.py").symlink_to(tmp_path / target)
    (tmp_path / "project" / "common.py").symlink_to(tmp_path / "shared" / "common.py")
    files = read(tmp_path / "project")
    assert named(files) == ["app.py", "common.py"]
    assert [(one.path, one.mend) for one in files.manifest.folders[0].left_out] == [("settings.py", "put a copy of the file there")]


def test_what_stays_behind_is_named_if_it_may_be_imported_and_in_a_bounded_list(tmp_path: Path) -> None:
    write(tmp_path, app_DOT_py="x", _DOT_gitignore="*.log\n*_gen.py\n/out/\n", out__a_DOT_py="x")
    before = read(tmp_path)
    assert [one.path for one in before.manifest.folders[0].left_out] == ["out"]
    for number in range(300):
        write(tmp_path, **{f"{number}_DOT_log": "x"})
    assert read(tmp_path).sha256 == before.sha256
    for number in range(300):
        write(tmp_path, **{f"m{number}_gen_DOT_py": "x"})
    assert len(read(tmp_path).manifest.folders[0].left_out) == manifest.MAX_LEFT_OUT


def test_the_ignore_files_of_the_repository_around_a_folder_count(tmp_path: Path) -> None:
    write(tmp_path / "src", app_DOT_py="x", notes_DOT_log="x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*.log\n")
    assert named(read(tmp_path / "src")) == ["app.py"]


def test_too_much_is_refused_with_the_names_of_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_BYTES", 1000)
    write(tmp_path, app_DOT_py="x", weights_DOT_bin=b"w" * 2000)
    with pytest.raises(BadValue, match=r"largest: weights\.bin .*\.mqserveignore"):
        read(tmp_path)
    (tmp_path / ".mqserveignore").write_text("*.bin\n")
    assert named(read(tmp_path)) == [".mqserveignore", "app.py"]
    monkeypatch.setattr(manifest, "MAX_FILES", 1)
    with pytest.raises(BadValue, match=r"holds 2 files, and at most 1 travel"):
        read(tmp_path)


def test_a_home_folder_the_root_and_site_packages_are_refused_as_folders_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "somebody"))
    for root in (tmp_path / "home" / "somebody", tmp_path / "home", Path("/"), tmp_path / "venv" / "lib" / "site-packages"):
        with pytest.raises(BadValue, match="move the code into a folder of its own"):
            check_root(root, "app.py")
    check_root(tmp_path / "home" / "somebody" / "project", "app.py")


def test_a_home_folder_is_refused_by_each_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "project").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for home in ("link", "real"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        for root in (tmp_path / "link", tmp_path / "real"):
            with pytest.raises(BadValue, match=r"your home folder, .* move the code into a folder of its own"):
                check_root(root, "app.py")
        check_root(tmp_path / "link" / "project", "app.py")


def test_folders_that_everybody_uses_are_refused_and_folders_in_them_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    for root in (tmp_path, Path("/tmp"), Path("/var/tmp"), Path("/etc"), Path("/opt"), Path("/usr/local"), Path("/srv")):
        with pytest.raises(BadValue, match=r"(temporary files|of the system), .* move the code into a folder of its own"):
            check_root(root, "app.py")
    for root in (tmp_path / "project", Path("/opt/project"), Path("/srv/project"), Path("/app")):
        check_root(root, "app.py")


def test_inside_a_package_the_folder_is_the_first_parent_without_an_init_file(tmp_path: Path) -> None:
    write(tmp_path, **{"pkg__sub__app_DOT_py": "x"})
    for folder in ("pkg", "pkg/sub"):
        (tmp_path / folder / "__init__.py").touch()
    assert root_of_file(tmp_path / "pkg" / "sub" / "app.py") == tmp_path


# What is deployed.


def test_a_definition_of_a_module_goes_by_name_with_its_folder(module: ModuleType, signer: Signer, tmp_path: Path) -> None:
    packed = pack_backend(module.Model, (), signer)
    assert packed.files is not None
    assert (packed.code.target, named(packed.files), packed.files.roots) == (
        "travelling_mod:Model",
        ["travelling_mod.py"],
        (tmp_path / "code",),
    )


def test_a_file_that_changed_since_it_was_imported_is_refused(
    module: ModuleType, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "code" / "travelling_mod.py"
    path.write_text(path.read_text() + "\n# only a remark\n")
    pack_backend(module.Model, (), signer)
    path.write_text(path.read_text().replace("return LIMIT", "return LIMIT + 1"))
    with pytest.raises(BadValue, match=r"travelling_mod\.py changed since .* start the program again"):
        pack_backend(module.Model, (), signer)
    importlib.reload(module)
    pack_backend(module.Model, (), signer)
    path.write_text(path.read_text() + "\nLIMIT = 12\n")
    with pytest.raises(BadValue, match=r"travelling_mod\.py changed since"):
        pack_backend(module.Model, (), signer)


def test_a_run_file_that_changed_since_it_was_executed_is_refused(signer: Signer, tmp_path: Path) -> None:
    run_file = RunFile.read(write(tmp_path, app_DOT_py="x = 1\n") / "app.py")
    pack_backend(test_a_run_file_that_changed_since_it_was_executed_is_refused, (), signer, run_file)
    write(tmp_path, app_DOT_py="x = 2\n")
    with pytest.raises(BadValue, match=r"app\.py changed since"):
        pack_backend(test_a_run_file_that_changed_since_it_was_executed_is_refused, (), signer, run_file)


def test_what_is_deployed_and_ignored_is_refused_with_the_line_to_write(module: ModuleType, signer: Signer, tmp_path: Path) -> None:
    write(tmp_path / "code", _DOT_gitignore="travelling_*\n")
    with pytest.raises(BadValue, match=r"'travelling_\*' in .*\.gitignore names it; take it back by a line !/travelling_mod\.py"):
        pack_backend(module.Model, (), signer)
    write(tmp_path / "code", _DOT_mqserveignore="!travelling_mod.py\n")
    assert "travelling_mod.py" in named(pack_backend(module.Model, (), signer).files)  # type: ignore[arg-type]


def test_without_a_key_nothing_but_a_name_travels(module: ModuleType) -> None:
    nobody = Signer([], "ns")
    assert pack_backend("travelling_mod:Model", (), nobody).files is None
    with pytest.raises(NotEncodable, match=r"MQSERVE_SECRET_KEY.*'package\.module:Model'"):
        pack_backend(module.Model, (), nobody)


def test_a_name_whose_folder_cannot_travel_goes_alone(
    module: ModuleType, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack_backend("travelling_mod:Model", (), signer).files is not None
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    assert pack_backend("travelling_mod:Model", (), signer).files is None
    with pytest.raises(BadValue, match="at most"):
        pack_backend(module.Model, (), signer)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "code"))
    assert pack_backend("travelling_mod:Model", (), signer).files is None
    with pytest.raises(BadValue, match="temporary files"):
        pack_backend(module.Model, (), signer)


def test_a_capture_that_cannot_travel_is_named(signer: Signer) -> None:
    lock, stream = threading.Lock(), open(os.devnull)  # noqa: SIM115

    def helper() -> Any:
        return lock

    def handler(request: Any) -> Any:
        return helper(), 1

    with stream, pytest.raises(NotEncodable, match=r"variable 'helper' .* that uses the variable 'lock' .*\(a _thread\.lock\)") as refused:
        pack_backend(handler, (), signer)
    assert "or put the code into a module" in str(refused.value)


def test_a_module_in_an_ignored_folder_is_refused_with_a_line_that_helps(signer: Signer, tmp_path: Path, module: ModuleType) -> None:
    write(tmp_path / "code", genp_mod__inner_DOT_py="def f(request):\n    return 1\n", _DOT_gitignore="genp_mod/\n")
    inner = importlib.import_module("genp_mod.inner")
    with pytest.raises(BadValue, match=r"inner\.py is deployed, and does not travel: 'genp_mod/' in .*gitignore names it") as refused:
        pack_backend(inner.f, (), signer)
    (line,) = re.findall(r"take it back by a line (\S+) in ", str(refused.value))
    write(tmp_path / "code", _DOT_mqserveignore=f"{line}\n")
    assert "genp_mod/inner.py" in named(pack_backend(inner.f, (), signer).files)  # type: ignore[arg-type]
    write(tmp_path / "code", genp_mod___DOT_mqserveignore="inner.py\n")
    with pytest.raises(BadValue, match=r"'inner\.py' in .*genp_mod/\.mqserveignore names it; remove that line"):
        pack_backend(inner.f, (), signer)
    for name in ("genp_mod.inner", "genp_mod"):
        del sys.modules[name]


def test_a_folder_in_another_travels_as_a_path_of_the_outer_one(tmp_path: Path) -> None:
    project, other = tmp_path / "project", tmp_path / "other"
    folders: Folders = {}
    for root in (project / "src", other, project, project / "lib"):
        folders = with_root(folders, root)
    assert folders == {project: ("src", "", "lib"), other: ("",)}
    assert list(folders) == [project, other]


def test_what_a_module_uses_from_the_folder_around_its_own_travels(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "project", outer9_mod_DOT_py="X = 1\n", src__inner9_mod_DOT_py="import outer9_mod\ndef f(request):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path / "project")
    monkeypatch.syspath_prepend(tmp_path / "project" / "src")
    files = pack_backend(importlib.import_module("inner9_mod").f, (), signer).files
    assert files is not None
    assert (named(files), files.manifest.folders[0].paths) == (["outer9_mod.py", "src/inner9_mod.py"], ("src", ""))
    for name in ("inner9_mod", "outer9_mod"):
        del sys.modules[name]


def test_a_run_file_in_a_package_has_its_neighbours_first_and_is_found_in_a_folder_around(signer: Signer, tmp_path: Path) -> None:
    write(tmp_path, pkg__app_DOT_py="x = 1\n")
    (tmp_path / "pkg" / "__init__.py").touch()
    run_file = RunFile.read(tmp_path / "pkg" / "app.py")
    folders = folders_of(set(), run_file)
    assert folders == {tmp_path: ("pkg", "")}
    outer = with_root(folders, tmp_path.parent)
    assert outer == {tmp_path.parent: (f"{tmp_path.name}/pkg", tmp_path.name, "")}
    files = Files(Manifest((Folder("", (File(f"{tmp_path.name}/pkg/app.py", 0, ()),)),)), (tmp_path.parent,))
    assert name_of_file(run_file.path, files) == f"0/{tmp_path.name}/pkg/app.py"


# How it is stored.


@pytest.mark.anyio
async def test_a_file_that_is_being_written_travels_as_it_was_and_another_that_changes_is_said(
    store: Store, keys: StoreKeys, tmp_path: Path, code_cache: Path
) -> None:
    folder = write(tmp_path / "code", output_DOT_txt="first line\n", large_DOT_bin=b"x" * 100_000)
    os.utime(folder / "large.bin", (0, 0))
    files = read(folder)
    write(folder, output_DOT_txt="first line\nsecond line\n")
    await save_files(store, keys, files)
    (arrived,) = (await restore_files(store, keys, files.sha256)).roots
    assert (arrived / "output.txt").read_text() == "first line\n"
    await store.delete(*map(keys.code, files.manifest.chunks))
    write(folder, large_DOT_bin=b"y" * 100_000)
    with pytest.raises(BadValue, match=r"large\.bin changed while it was being deployed"):
        await save_files(store, keys, files)


@pytest.mark.anyio
async def test_a_record_leads_to_all_that_has_to_be_kept_with_it(store: Store, keys: StoreKeys, signer: Signer, module: ModuleType) -> None:
    packed = pack_backend(module.Model, (), signer)
    assert packed.files is not None
    await save(store, keys, packed)
    assert await files_of(store, keys, packed.code.to_bytes()) == packed.files.manifest.chunks | {packed.files.sha256}
    assert await files_of(store, keys, b"\xc1") == frozenset()


@pytest.mark.anyio
async def test_what_is_there_is_extended_and_what_is_missing_is_told(store: Store, keys: StoreKeys) -> None:
    await store.put_if_absent(keys.code("short"), b"x", ttl_ms=500)
    await store.put_if_absent(keys.code("shorter"), b"x", ttl_ms=500)
    await store.set(keys.code("for-ever"), b"x")
    asked = [keys.code(name) for name in ("short", "for-ever", "none")]
    assert await store.extend(asked, CODE_TTL_S * 1000) == {keys.code("none")}
    async with asyncio.timeout(10):
        while await store.get(keys.code("shorter")):
            await asyncio.sleep(0.05)
    assert await store.get(keys.code("short")) == b"x"


# Why it cannot be imported.


@pytest.fixture
def restored(tmp_path: Path) -> Restored:
    files = (File("fast.cpython-399-x86_64-linux-gnu.so", 0, ()), File("app.py", 0, ()))
    left_out = (LeftOut("secrets.py", "'secrets.py' in .gitignore names it", "take it back by a line !/secrets.py"),)
    folder = Folder("/home/me/project", files, left_out=left_out)
    return Restored(Manifest((folder,), ("json", "app")), (tmp_path,))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fast", r"compiled for another Python than this replica's, which takes \.cpython-3"),
        ("secrets", r"secrets\.py did not travel, since .* names it: take it back by a line !/secrets\.py"),
        ("pandas_like", r"neither installed for .* nor among the files that travelled from /home/me/project.*actor_options pip"),
    ],
)
def test_a_missing_module_is_said_with_the_mend(restored: Restored, name: str, said: str) -> None:
    assert re.search(said, mend_of(ModuleNotFoundError(name=name), restored))


def test_a_missing_module_that_an_ignore_file_kept_back_is_said_for_each_folder_on_the_path(tmp_path: Path) -> None:
    write(tmp_path, src__gen_DOT_py="x", src__app_DOT_py="x", built__deep_DOT_py="x", _DOT_gitignore="gen.py\nbuilt/\n")
    files = read_folders({tmp_path: ("src", "")}, ())
    arrived = Restored(files.manifest, files.roots)
    for name, line in (("gen", "!/src/gen.py"), ("built.deep", "!/built")):
        assert f"take it back by a line {line} in {tmp_path}/.mqserveignore" in mend_of(ModuleNotFoundError(name=name), arrived)
    assert "install it there" in mend_of(ModuleNotFoundError(name="gen_other"), arrived)


def test_a_library_of_another_machine_is_said_and_other_import_errors_speak_for_themselves(restored: Restored, tmp_path: Path) -> None:
    foreign = ImportError("invalid ELF header", name="fast", path=str(tmp_path / "fast.so"))
    assert "compiled for another machine or another Python" in mend_of(foreign, restored)
    assert mend_of(ImportError("cannot import name 'x'", name="app", path=str(tmp_path / "app.py")), restored) == ""


def test_a_module_that_is_shadowed_by_one_of_ours_is_said(restored: Restored, tmp_path: Path) -> None:
    assert shadowed(restored) == ""
    write(tmp_path, json_DOT_py="x = 1\n")
    assert "give yours another name" in shadowed(restored)


def test_a_packed_backend_is_a_record_and_its_files(signer: Signer) -> None:
    assert pack_backend("starlette.requests:Request", (), signer) == Packed(pack_backend("starlette.requests:Request", (), signer).code)


def test_modules_are_found_while_a_finalizer_imports_others(tmp_path: Path) -> None:
    """As a resource warning does, when the collector finds a socket that nobody closed."""
    imported: list[str] = []

    def collected(phase: str, info: dict[str, int]) -> None:
        imported.append(f"imported_by_a_finalizer_{len(imported)}")
        sys.modules[imported[-1]] = ModuleType(imported[-1])

    thresholds = gc.get_threshold()
    pairs = [(number, -number) for number in range(5000)]  # Python keeps freed tuples, and only new ones count for the collector
    gc.set_threshold(1)
    gc.callbacks.append(collected)
    try:
        assert modules_in(tmp_path) == []
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*thresholds)
        for name in imported:
            del sys.modules[name]
    assert imported and pairs

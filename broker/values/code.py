"""Records of code: an import string, or a sealed pickle, in a sealed record, which is stored under its hash.

In the embedded form code is not pickled: the process's own store holds the object itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import cloudpickle
import msgspec

from ..errors import UNPARSABLE, BadEnvelope, BadSignature, BadValue, NotEncodable
from ..files.roots import is_installed
from ..files.transfer import load_manifest
from ..process import forks
from ..store import Store
from ..store_keys import CODE_TTL_S, StoreKeys
from . import definitions, pickling
from .codecs import MSGPACK, decode_value, encode_value
from .signing import SealScope, Signer

CLAIM = SealScope("code")
FOR_ALL = "all."
_ADDED = ("files", "run_file", "home", "factory")
_NO_ARGUMENTS = (MSGPACK, msgspec.msgpack.encode([]))
_packing = forks.Lock()  # what cloudpickle is told of a module is one for all threads, and two may deploy from one module


class Code(msgspec.Struct, frozen=True):
    """A target and the arguments to construct it with; exactly one of `target` (`pkg.mod:attr`) and `sealed` is set.

    `seal` is over all of the record, since a name is as good as code to whoever may choose it; empty where there is no key. `files` is the
    hash of the manifest of the files that travel with it; `run_file` is the one of them that is executed as `__main__`, as
    `<number of its folder>/<path>`; `home` is that of the `__main__` which it comes from, where there is no such file. `factory` says that
    the target is a function to call with the arguments, which returns an ASGI app.
    """

    name: str
    target: str = ""
    sealed: bytes = b""
    args_type: str = ""
    args: bytes = b""
    seal: bytes = b""
    files: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    run_file: str = ""
    home: str = ""
    factory: bool = False

    def to_bytes(self) -> bytes:
        """Without the last four where they are empty: so the seals of earlier versions, which had none of them, hold."""
        fields = msgspec.structs.asdict(self)
        return msgspec.msgpack.encode({name: value for name, value in fields.items() if value or name not in _ADDED})

    def with_seal(self, signer: Signer) -> Code:
        return msgspec.structs.replace(self, seal=signer.seal(b"", self._claim)) if signer else self

    def check(self, signer: Signer) -> None:
        """Raises BadSignature unless a holder of the key made the record. Without a key only names are taken, unchecked.

        Code that an earlier version sent by value has a seal of its own and none of the record. It is taken if the record has nothing
        beside it that the seal would have to cover.
        """
        if not signer:
            if self.files or self.run_file or self.sealed:
                raise BadSignature(
                    f"the code {self.name!r} in the store came with files or by value, and this process has no key to check it by: set "
                    "MQSERVE_SECRET_KEY to that of the instance"
                )
            return
        if self.seal:
            signer.open(self.seal, self._claim)
        elif not self.sealed or (self.args_type, self.args) != _NO_ARGUMENTS or any(self._beside_seal):
            raise BadSignature(
                f"the code {self.name!r} in the store was not sealed by a key of this instance, but by an earlier version, by a client "
                "without MQSERVE_SECRET_KEY, or by whoever may write there: deploy it again"
            )

    @property
    def _beside_seal(self) -> tuple[object, ...]:
        return self.target, self.files, self.run_file, self.home, self.factory

    @property
    def _claim(self) -> SealScope:
        unsealed = msgspec.structs.replace(self, seal=b"").to_bytes()
        return SealScope("code", id=hashlib.sha256(unsealed).hexdigest(), content_type="record")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


class CodeHere(bytes):
    """Code of the embedded form. The memory store keeps the very bytes object that it is given, so the target is an attribute of it.

    The bytes are random, so that each deployment has a hash of its own. Constructor arguments are encoded as values, so that each replica
    constructs from its own copies.
    """

    name: str
    target: Any
    args_type: str
    args: bytes
    factory: bool

    @classmethod
    def of(cls, name: str, target: object, args_type: str, args: bytes, *, factory: bool = False) -> CodeHere:
        here = cls(secrets.token_bytes(16))
        here.name, here.target, here.args_type, here.args, here.factory = name, target, args_type, args, factory
        return here

    def to_bytes(self) -> bytes:
        return self

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self).hexdigest()


def pack_here(target: object, args: tuple[Any, ...], signer: Signer, *, factory: bool = False) -> CodeHere:
    """Packs code for the embedded form: the object itself, or an import string. Raises NotEncodable if an argument cannot be encoded."""
    if isinstance(target, str):
        split(target)
    args_type, packed_args = encode_value(list(args), signer, CLAIM)
    return CodeHere.of(name_of(target), target, args_type, packed_args, factory=factory)


def pack(target: object, args: tuple[Any, ...], signer: Signer) -> Code:
    """Packs a callable, or any object that pickles; an import string stays as it is.

    Raises NotEncodable, with the way out, when it must go by value and there is no key or it does not pickle.
    """
    if isinstance(target, str):
        split(target)
        by_name = target
    else:
        by_name = installed_name(target)
    name = name_of(target)
    args_type, packed_args = encode_value(list(args), signer, CLAIM)
    if by_name:
        return Code(name, target=by_name, args_type=args_type, args=packed_args).with_seal(signer)
    if not signer:
        raise NotEncodable(
            f"{name} would travel by value, as a signed pickle, and there is no key: set MQSERVE_SECRET_KEY (the same for all "
            f"processes of the instance), or name importable code by a string such as 'package.module:{name}'"
        )
    try:
        with _by_value(target):
            payload = pickling.dumps_by_value(target)
    except Exception as error:
        raise NotEncodable(
            f"{name} cannot travel to its replicas: it does not pickle ({error}); keep such objects out of globals and closures, "
            "make them in the constructor, or name the code by an import string"
        ) from error
    return Code(name, sealed=signer.seal(payload, CLAIM), args_type=args_type, args=packed_args).with_seal(signer)


def pack_for_all(target: object, signer: Signer, *, embedded: bool) -> Code | CodeHere:
    """Packs what processes load that serve several clients, convertors and middlewares: no files travel with it. Raises as `pack` does."""
    return pack_here(target, (), signer) if embedded else pack(target, (), signer)


def unpack(raw: bytes, sha256: str, signer: Signer) -> tuple[Any, list[Any]]:
    """Returns (target, constructor arguments). Raises BadSignature before it unpickles bytes or imports a name that we did not seal;
    ImportError, and whatever importing raises.
    """
    return make(open_record(raw, sha256, signer), signer)


def open_record(raw: bytes, sha256: str, signer: Signer) -> Code | CodeHere:
    """Raises BadSignature if the record is not the deployed one or no holder of the key made it; BadEnvelope if it does not parse."""
    if isinstance(raw, CodeHere):
        return raw
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise BadSignature("the code in the store is not the code that was deployed: its hash differs")
    try:
        code = msgspec.msgpack.decode(raw, type=Code)
    except UNPARSABLE as error:
        raise BadEnvelope(f"the code in the store does not parse ({error})") from error
    code.check(signer)
    return code


def make(code: Code | CodeHere, signer: Signer) -> tuple[Any, list[Any]]:
    """Returns (target, constructor arguments) of an opened record. Raises ImportError, and whatever importing and unpickling raise."""
    if isinstance(code, CodeHere):
        target = load_import_string(code.target) if isinstance(code.target, str) else code.target
    elif code.sealed:
        target = pickling.loads_code(signer.open(code.sealed, CLAIM))
    else:
        target = load_import_string(code.target, in_cwd=not code.files)
    return target, decode_value(code.args, code.args_type, signer, CLAIM)


async def save(store: Store, keys: StoreKeys, code: Code | CodeHere) -> str:
    """Stores the record under its hash, with a TTL, which the leader removes while the desired document names it. Returns the hash."""
    return await _save(store, keys, code, code.sha256)


async def save_for_all(store: Store, keys: StoreKeys, code: Code | CodeHere) -> str:
    """Like `save`, for code that proxies load, too: its name has a prefix of its own, since proxies may read no other code."""
    return await _save(store, keys, code, FOR_ALL + code.sha256)


async def _save(store: Store, keys: StoreKeys, code: Code | CodeHere, name: str) -> str:
    await store.put_if_absent(keys.code(name), code.to_bytes(), ttl_ms=CODE_TTL_S * 1000)
    return name


async def files_of(store: Store, keys: StoreKeys, raw: bytes) -> frozenset[str] | None:
    """Returns the hashes of a record's manifest and chunks, or None if the manifest cannot be read now. It checks no seal: its callers
    only set TTLs or delete."""
    try:
        files = msgspec.msgpack.decode(raw, type=Code).files
    except UNPARSABLE:
        return frozenset()
    try:
        return (await load_manifest(store, keys, files)).chunks | {files} if files else frozenset()
    except (BadEnvelope, BadValue, BadSignature):
        return None


async def load(store: Store, keys: StoreKeys, name: str, signer: Signer) -> tuple[Any, list[Any]]:
    """Returns what `unpack` makes of the record in the store; `name` is what saving it returned. It unpacks in a thread of its own: an
    import may take long, and the caller's event loop has requests, acks and heartbeats to see to."""
    raw = await store.get_large(keys.code(name))
    if raw is None:
        raise BadValue(f"the code {name[:16]} is not in the store: deploy it again")
    return await asyncio.to_thread(unpack, raw, name.removeprefix(FOR_ALL), signer)


def load_import_string(target: str, *, in_cwd: bool = True) -> Any:
    """Returns what `pkg.mod:attr` names; with `in_cwd` the module may also lie in the working directory. Raises ImportError with a sentence
    when the module or the attribute is missing."""
    module_name, attributes = split(target)
    if in_cwd and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise ImportError(f"cannot import {target!r}: {found!r} has no attribute {attribute!r}") from error
    return found


def name_of(target: object) -> str:
    """Returns its name for messages."""
    return target if isinstance(target, str) else str(getattr(target, "__qualname__", type(target).__qualname__))


def split(target: str) -> tuple[str, str]:
    """`pkg.mod:attr`, or `pkg.mod.attr` as the seed writes it."""
    module, colon, attribute = target.partition(":")
    if not colon:
        module, _, attribute = target.rpartition(".")
    if not module or not attribute:
        raise BadValue(f"{target!r} names no code: write 'package.module:attribute'")
    return module, attribute


def installed_name(target: object) -> str:
    """Returns the import string of something that every machine with the same packages has, else ''."""
    if not isinstance(target, Callable) or not hasattr(target, "__qualname__"):  # type: ignore[arg-type]
        return ""
    module = sys.modules.get(getattr(target, "__module__", "") or "")
    if module is None or module.__name__ == "__main__" or not is_installed(module) or "<" in target.__qualname__:
        return ""
    return f"{module.__name__}:{target.__qualname__}" if definitions.is_found_by_name(target, module) else ""


def name_of_object(target: object, may_hold: Callable[[ModuleType], bool]) -> str:
    """Returns the import string of an object that is no function and no class, such as an ASGI app, from the modules that `may_hold` it;
    '' if none has it as a global."""
    if hasattr(target, "__qualname__") or isinstance(target, str):
        return ""
    for module in list(sys.modules.values()):  # in the order in which their imports ended, so the one that defines it comes first
        if isinstance(module, ModuleType) and may_hold(module):
            for name, value in vars(module).copy().items():
                if value is target:
                    return f"{module.__name__}:{name}"
    return ""


@contextmanager
def _by_value(target: object) -> Iterator[None]:
    """Lets cloudpickle take the modules of convertors and middlewares by value; what `__main__` defines it takes so anyway."""
    modules = {module for one in (target if isinstance(target, list) else [target]) if (module := _own_module(one)) is not None}
    with _packing:
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)


def _own_module(target: Any) -> ModuleType | None:
    """Returns the user's module that a convertor, or the class of a middleware, is from; None for `__main__` and what is installed."""
    module = inspect.getmodule(getattr(target, "cls", target))  # a Middleware has its class there
    if module is None or module.__name__ == "__main__" or is_installed(module) or module.__name__ not in sys.modules:
        return None
    return module

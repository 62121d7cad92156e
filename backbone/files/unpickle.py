"""Reads pickles as data. A pickle is a program for a small machine; this machine knows containers, numbers and text.

It is the standard library's Python unpickler with most of its operations removed. The others may call only what
``known`` holds, so that a hostile file ends in an error instead of running.
"""

from __future__ import annotations

import collections
import pickle
import pickletools
from typing import Any

from backbone.files.lazy import Refused

# The operations in pickles of tensors and containers. Left out on purpose: those that create instances of classes
# (INST, OBJ, NEWOBJ), extensions, and the text opcodes of protocol 0.
OPERATIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT,
    pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD,
    pickle.BINPERSID, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.LONG1, pickle.LONG4, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8,
    pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM,
    pickle.SETITEMS,
)  # fmt: skip


class Described:
    """What the unpickler builds instead of a foreign object: a description that ``build`` may complete."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """Set the state that the pickle gives the object."""
        raise Refused(f"its pickle gives a state to a {type(self).__name__.strip('_')}, which has none")


class _Operations(dict):
    def __missing__(self, code: int) -> Any:
        named = pickletools.code2op.get(chr(code))
        raise Refused(f"its pickle uses {named.name if named else code}, which no tensor needs: do not trust it")


class RestrictedUnpickler(pickle._Unpickler):
    """``known``: the globals a pickle may name, (module, name) -> their replacement."""

    known: dict[tuple[str, str], Any] = {("collections", "OrderedDict"): collections.OrderedDict}  # noqa: RUF012
    dispatch = _Operations({operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in OPERATIONS})

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of a global; raises Refused for an unknown one."""
        if (module, name) not in self.known:
            raise Refused(
                f"its pickle names {module}.{name}, which is not part of a tensor; "
                "no weights file needs that: do not trust it, use safetensors"
            )
        return self.known[module, name]

    def _set(self, target: Any, keys: list, values: list) -> None:
        if not isinstance(target, dict):
            raise Refused(f"its pickle puts items into a {type(target).__name__}")
        for key, value in zip(keys, values, strict=True):
            if key in target:
                raise Refused(f"it holds {key!r:.80} twice; expected every tensor once")
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key], [value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items[::2], items[1::2])

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Described):
            target.build(state)
        elif type(target) is not collections.OrderedDict:  # torch attaches versions of modules to a state dict: dropped
            raise Refused(f"its pickle gives a state to a {type(target).__name__}")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build

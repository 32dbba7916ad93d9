"""Primitives, shapes and dtypes of an MLX graph that has not been evaluated.

MLX's own exports do not say enough: `mx.export_to_dot` has no shapes, and `mx.export_function` simplifies the graph in
place and refuses `mx.custom_function` and `mx.compile`. So a walker of some eighty lines of C++ is compiled against the
headers of the installed wheel when it is first needed (about two seconds), and kept in the cache folder.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from orpo_mlx.errors import UserError
from orpo_mlx.files import cache_folder

_MLX = version("mlx")

TAG = 65521
"""First dimension of the arrays that tell a marker's `Depends` (see `metal`) from any other."""

ITEM_BYTES = {"b1": 1, "u1": 1, "i1": 1, "u2": 2, "i2": 2, "u4": 4, "i4": 4, "u8": 8, "i8": 8}
ITEM_BYTES |= {"f2": 2, "g2": 2, "f4": 4, "f8": 8, "c8": 8}
"""Bytes per element of the walker's dtypes; g2 is bfloat16."""


class Operand(NamedTuple):
    """One input or output of a primitive."""

    dtype: str
    shape: tuple[int, ...]
    stored: int
    """Elements that lie in memory: fewer than the shape has where an input is a broadcast of something smaller."""

    @property
    def size(self) -> int:
        """Elements of the shape."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        """Bytes that lie in memory."""
        return self.stored * ITEM_BYTES[self.dtype]


class Node(NamedTuple):
    """A primitive with its operands; equal nodes of a graph are counted together."""

    name: str
    """MLX's name; "Compiled" for every fused one; "Marker" for what `metal` put in the place of a fused primitive."""
    kind: int
    """Which marker."""
    detail: int
    """What else the marker says."""
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


_SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>
#include "mlx/array.h"
#include "mlx/primitives.h"
using mlx::core::array;
namespace {
std::unordered_set<std::uintptr_t> counted;
std::vector<array> kept;  // Addresses name arrays, so nothing that has been counted may be freed.

// A Python object of nanobind: the header, an offset to the C++ object, and a bit that says whether it lies there or is
// pointed to from there.
const array& of_python(void* object, int header) {
  std::int32_t offset; std::uint32_t flags;
  std::memcpy(&offset, (char*)object + header, 4);
  std::memcpy(&flags, (char*)object + header + 4, 4);
  void* place = (char*)object + offset;
  return *(const array*)((flags & 4) ? place : *(void**)place);
}
bool pending(const array& a) { return a.has_primitive() && a.status() == array::Status::unscheduled; }
bool is(const array& a, const char* name) { return pending(a) && !std::strcmp(a.primitive().name(), name); }
bool is_tag(const array& a) {
  return !pending(a) && a.ndim() == 4 && a.shape(0) == TAG && a.dtype() == mlx::core::uint8;
}
bool is_marker(const array& a) { return is(a, "Depends") && is_tag(a.inputs().back()); }
array unwrapped(const array& a) { return is(a, "StopGradient") ? a.inputs()[0] : a; }
// The mx.custom_function that gives a marker its gradient; MLX's fused primitives have theirs themselves.
bool is_wrapper(const array& a) {
  return is(a, "CustomTransforms") && !a.inputs().empty() && is_marker(unwrapped(a.inputs().back()));
}
std::size_t stored(const array& a) {
  static const std::unordered_set<std::string> views = {
    "Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten", "Transpose",
    "StopGradient", "Copy"};
  std::size_t size = a.size();
  const array* at = &a;
  while (pending(*at) && views.count(at->primitive().name()) && !at->inputs().empty()) {
    at = &at->inputs()[0];
    size = std::min(size, at->size());
  }
  return size;
}
const char* dtype(const array& a) {
  using namespace mlx::core;
  switch (a.dtype()) {
    case bool_: return "b1"; case uint8: return "u1"; case int8: return "i1"; case uint16: return "u2";
    case int16: return "i2"; case uint32: return "u4"; case int32: return "i4"; case uint64: return "u8";
    case int64: return "i8"; case float16: return "f2"; case bfloat16: return "g2"; case float32: return "f4";
    case float64: return "f8"; default: return "c8";
  }
}
void write(std::string& out, const array& a, std::size_t elements) {
  out += dtype(a);
  for (int i = 0; i < (int)a.ndim(); i++) out += "," + std::to_string(a.shape(i));
  out += ":" + std::to_string(elements) + ";";
}
std::string described(const array& a) {
  std::vector<array> inputs = a.inputs(), outputs = const_cast<array&>(a).outputs();
  std::string name = a.primitive().name(), mark = "\t0\t0\t";
  if (name.rfind("Compiled", 0) == 0) name = "Compiled";
  if (is_marker(a)) {
    auto tag = inputs.back();
    name = "Marker";
    mark = "\t" + std::to_string(tag.shape(1) - 1) + "\t" + std::to_string(tag.shape(2) - 1) + "\t";
    inputs = {inputs.begin() + outputs.size(), inputs.end() - 1};
  }
  std::string out = name + mark;
  for (auto& in : inputs) write(out, in, stored(in));
  out += "\t";
  for (auto& o : outputs) write(out, o, o.size());
  return out;
}
std::vector<array> next(const array& a) {
  auto inputs = a.inputs();
  // What stands behind a marker's outputs is not there on Metal.
  if (is_marker(a)) inputs.erase(inputs.begin(), inputs.begin() + const_cast<array&>(a).outputs().size());
  if (is_wrapper(a)) for (auto& in : inputs) in = is_marker(unwrapped(in)) ? unwrapped(in) : in;
  return inputs;
}
}  // namespace
extern "C" int shape_sum(void* object, int header) {
  int sum = 0;
  for (auto length : of_python(object, header).shape()) sum = sum * 10 + length;
  return sum;
}
extern "C" int is_pending(void* object, int header) {
  auto& a = of_python(object, header);
  return pending(a) && !counted.count(a.id());
}
// Makes of a scalar an array of any shape in the same memory, without a primitive. Evaluating a broadcast would do, but
// MLX keeps the primitives of what is evaluated while a function is traced.
extern "C" void widen(void* object, int header, int* shape, int ndim) {
  auto& scalar = const_cast<array&>(of_python(object, header));
  array wide(mlx::core::Shape(shape, shape + ndim), scalar.dtype(), nullptr, {});
  array::Flags flags{};
  flags.contiguous = true;
  wide.copy_shared_buffer(scalar, mlx::core::Strides(ndim, 0), flags, 1);
  wide.set_status(array::Status::available);
  scalar = wide;
}
extern "C" int is_evaluated(void* object, int header) { return !pending(of_python(object, header)); }
extern "C" void forget() { counted.clear(); kept.clear(); }
extern "C" char* walk(void** objects, int n, int header) {
  std::unordered_map<std::string, long> found;
  std::vector<array> stack;
  for (int i = 0; i < n; i++) stack.push_back(of_python(objects[i], header));
  kept.insert(kept.end(), stack.begin(), stack.end());
  while (!stack.empty()) {
    array a = stack.back();
    stack.pop_back();
    if (!pending(a) || !counted.insert(a.id()).second) continue;
    for (auto& sibling : a.siblings()) counted.insert(sibling.id());
    if (!is_wrapper(a)) found[described(a)]++;
    for (auto& in : next(a)) stack.push_back(in);
  }
  std::string text;
  for (auto& [line, times] : found) text += std::to_string(times) + "\t" + line + "\n";
  char* result = (char*)std::malloc(text.size() + 1);
  std::memcpy(result, text.c_str(), text.size() + 1);
  return result;
}
extern "C" void release(char* text) { std::free(text); }
"""


class Walker:
    """Counts nodes of graphs, each node once until `forget`.

    Raises:
        UserError: the walker cannot be compiled or loaded.
    """

    def __init__(self) -> None:
        self._library = _load()
        self._header = object.__basicsize__

    def walk(self, arrays: Iterable[mx.array]) -> Counter[Node]:
        """Nodes that evaluating `arrays` would compute and that have not been counted yet."""
        objects = list(arrays)
        pointers = (ctypes.c_void_p * len(objects))(*map(id, objects))
        address = self._library.walk(pointers, len(objects), self._header)
        text = ctypes.string_at(address).decode()
        self._library.release(ctypes.c_void_p(address))
        nodes: Counter[Node] = Counter()
        for line in text.splitlines():
            times, node = line.split("\t", 1)
            nodes[_node(node)] += int(times)
        return nodes

    def is_pending(self, array: mx.array) -> bool:
        """Whether `array` has neither been evaluated nor counted."""
        return bool(self._library.is_pending(ctypes.c_void_p(id(array)), self._header))

    def is_evaluated(self, array: mx.array) -> bool:
        """Whether the numbers of `array` are there, or under way."""
        return bool(self._library.is_evaluated(ctypes.c_void_p(id(array)), self._header))

    def forget(self) -> None:
        """Begin anew, and let go of the graphs that were counted."""
        self._library.forget()


def zeros(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Zeros of any shape in the memory of one, not to be computed: a leaf of graphs."""
    array = mx.array(0, dtype)
    lengths = (ctypes.c_int * len(shape))(*shape)
    _load().widen(ctypes.c_void_p(id(array)), object.__basicsize__, lengths, len(shape))
    return array


@functools.lru_cache(maxsize=1 << 16)
def _node(text: str) -> Node:
    name, kind, detail, inputs, outputs = text.split("\t")
    return Node(name, int(kind), int(detail), _operands(inputs), _operands(outputs))


def _operands(text: str) -> tuple[Operand, ...]:
    found = []
    for part in text.split(";")[:-1]:
        form, stored = part.split(":")
        dtype, *shape = form.split(",")
        found.append(Operand(dtype, tuple(map(int, shape)), int(stored)))
    return tuple(found)


@functools.cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    library.walk.restype = ctypes.c_void_p
    known = mx.zeros((2, 3, 5))
    if library.shape_sum(ctypes.c_void_p(id(known)), object.__basicsize__) != 235:
        raise UserError(
            f"graph_cost: arrays of mlx {_MLX} on Python {sys.version.split()[0]} are not laid out as this "
            "version of orpo-mlx expects: count with mlx 0.32."
        )
    return library


def _compiled() -> Path:
    """The library, compiled where it is not in the cache yet."""
    state = f"{_SOURCE}{TAG}{_MLX}{sysconfig.get_platform()}{sys.implementation.cache_tag}"
    name = f"walker-{hashlib.sha256(state.encode()).hexdigest()[:16]}.so"
    folder = _folder()
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            _compile(made)
            os.replace(made, target)
    return target


def _folder() -> Path:
    cache = cache_folder()
    if cache is not None:
        try:
            (cache / "graph_cost").mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            pass
        else:
            if os.access(cache / "graph_cost", os.W_OK):
                return cache / "graph_cost"
    folder = tempfile.mkdtemp(prefix="orpo_mlx-graph_cost-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(target: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise UserError(
            "graph_cost: found no C++ compiler among c++, g++ and clang++, and counting graphs needs one: install one "
            "(macOS: xcode-select --install; Debian: apt install g++) or name it in the environment variable CXX."
        )
    spec = importlib.util.find_spec("mlx.core")
    package = Path(str(spec.origin if spec else "")).parent
    source = target.with_suffix(".cpp")
    source.write_text(_SOURCE.replace("TAG", str(TAG)))
    flags = ["-O1", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{package / 'include'}", f"-L{package / 'lib'}", "-lmlx"]
    command = [*compiler.split(), str(source), *flags, f"-Wl,-rpath,{package / 'lib'}", "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"graph_cost: the C++ compiler {compiler} cannot be run ({error.strerror}): set CXX.") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise UserError(f"graph_cost: {compiler} cannot compile the walker against mlx {_MLX} ({reason}).")

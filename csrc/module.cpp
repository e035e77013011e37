// farskip_fused._C: what Triton cannot do. No libtorch: raw addresses, stream handles and numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "layout.h"
#include "status.h"
#ifdef FARSKIP_CUDA
#include "device.h"
#endif

namespace py = pybind11;

namespace farskip {
namespace {

py::object read_status(const StatusBlock& block) {
  const auto status = block.read();
  if (!status) return py::none();
  static constexpr const char* kNames[kStatusWords] = {"code", "rank", "peer", "phase", "epoch", "expected", "seen"};
  py::dict report;
  for (int word = 0; word < kStatusWords; ++word) report[kNames[word]] = (*status)[word];
  return report;
}

template <typename Id>
py::tuple layout_of(const py::array& experts, int64_t num_experts) {
  const auto ids = py::array_t<Id, py::array::c_style>::ensure(experts);
  const int64_t entries = ids.size();
  py::array_t<int64_t> counts(num_experts);
  py::array_t<int64_t> order(entries);
  int64_t routed = 0;
  {
    const Id* from = ids.data();
    int64_t* to_counts = counts.mutable_data();
    int64_t* to_order = order.mutable_data();
    py::gil_scoped_release release;
    routed = routing_layout(from, entries, num_experts, to_counts, to_order);
  }
  order.resize({routed});
  return py::make_tuple(counts, order);
}

py::tuple layout(const py::array& experts, int64_t num_experts) {
  if (num_experts < 1) {
    throw py::value_error("num_experts is " + std::to_string(num_experts) + "; it must be at least 1.");
  }
  const bool is_signed = experts.dtype().kind() == 'i';
  if (is_signed && experts.itemsize() == 4) return layout_of<int32_t>(experts, num_experts);
  if (is_signed && experts.itemsize() == 8) return layout_of<int64_t>(experts, num_experts);
  throw py::type_error("Expert ids have dtype " + py::str(experts.dtype()).cast<std::string>() +
                       "; use int32 or int64.");
}

Launch make_launch(std::uintptr_t function, unsigned threads, unsigned shared_bytes,
                   const std::vector<std::string>& types) {
  std::vector<Argument> arguments;
  for (const std::string& type : types) {
    if (!type.empty() && type[0] == '*') {
      arguments.push_back(Argument::kPointer);
    } else if (type == "i32") {
      arguments.push_back(Argument::kInt32);
    } else if (type == "i64") {
      arguments.push_back(Argument::kInt64);
    } else if (type == "constexpr") {
      arguments.push_back(Argument::kLeftOut);
    } else {
      throw py::value_error("An argument is of type " + type + "; a launch takes pointers, i32, i64 and constexpr.");
    }
  }
  return Launch(function, threads, shared_bytes, std::move(arguments));
}

// An integer of Python's; ValueError where it is none, or none of that type.
template <typename Integer>
Integer integer(const py::handle& given, const char* what) {
  try {
    return given.cast<Integer>();
  } catch (const py::cast_error&) {
    throw py::value_error(std::string(what) + " is " + py::repr(given).cast<std::string>() +
                          ", which is no integer of " + std::to_string(8 * sizeof(Integer)) + " bits.");
  }
}

int64_t value_of(const py::handle& argument, Argument kind) {
  if (kind == Argument::kPointer) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(argument.ptr(), data_ptr));
    if (!address) throw py::error_already_set();
    return static_cast<int64_t>(address.cast<std::uintptr_t>());
  }
  if (kind == Argument::kInt32) return integer<int32_t>(argument, "An argument");
  return integer<int64_t>(argument, "An argument");
}

void launch(const Launch& kernel, std::uintptr_t stream, const py::tuple& grid, const py::args& given) {
  const std::vector<Argument>& kinds = kernel.arguments();
  if (given.size() != kinds.size()) {
    throw py::type_error("The kernel takes " + std::to_string(kinds.size()) + " arguments and got " +
                         std::to_string(given.size()) + ".");
  }
  if (grid.size() > 3) throw py::value_error("A grid has three dimensions at most.");
  std::array<unsigned, 3> programs = {1, 1, 1};
  for (std::size_t axis = 0; axis < grid.size(); ++axis) {
    programs[axis] = integer<unsigned>(grid[axis], "A grid's dimension");
  }
  std::vector<int64_t> values;
  values.reserve(kinds.size());
  for (std::size_t at = 0; at < kinds.size(); ++at) {
    if (kinds[at] != Argument::kLeftOut) values.push_back(value_of(given[at], kinds[at]));
  }
  py::gil_scoped_release release;  // it waits where the stream has no room
  kernel(stream, programs, std::move(values));
}

#ifdef FARSKIP_CUDA
void checked_hold(std::uintptr_t stream, int64_t blocks, int64_t microseconds, bool exclusive) {
  if (blocks < 1 || blocks > INT32_MAX) {
    throw py::value_error("hold was asked for " + std::to_string(blocks) + " blocks; use 1 or more.");
  }
  if (microseconds < 0 || microseconds > 60'000'000) {
    throw py::value_error("hold was asked for " + std::to_string(microseconds) +
                          " microseconds; use 0 to 60000000, one minute.");
  }
  py::gil_scoped_release release;
  hold(stream, blocks, microseconds, exclusive);
}
#endif

}  // namespace
}  // namespace farskip

PYBIND11_MODULE(_C, module) {
  using farskip::Launch;
  using farskip::StatusBlock;
  module.doc() = "What Triton cannot do: host-visible status, launches that cost little, routing layout on the CPU, "
                 "residency on the GPU.";

  py::class_<StatusBlock>(module, "StatusBlock",
                          "A page of host memory where kernels report an expired wait: seven 64-bit words, code, rank, "
                          "peer, phase, epoch, expected and seen, the code written last.")
      .def(py::init<>())
      .def_property_readonly("address", &StatusBlock::address, "What kernels store to.")
      .def_property_readonly("host_address", &StatusBlock::host_address, "The same page as the host sees it.")
      .def("map_for_device", &StatusBlock::map_for_device,
           "Make the page visible to the GPUs of the current CUDA context; changes `address`. Raises RuntimeError "
           "without a driver or a context.")
      .def("read", &farskip::read_status, "The report as a dict, or None while nothing has happened.")
      .def("clear", &StatusBlock::clear, "Forget the report; no kernel may be writing.");

  py::class_<Launch>(module, "Launch", "A kernel that Triton has compiled and loaded, launched past its Python.")
      .def(py::init(&farskip::make_launch), py::arg("function"), py::arg("threads"), py::arg("shared_bytes"),
           py::arg("types"),
           "function: its CUfunction. threads: of a block. shared_bytes: dynamic shared memory of a block. types: of "
           "the arguments in order, as Triton names them: pointers, i32, i64, and constexpr for what is not passed. "
           "Raises ValueError for another type and RuntimeError without a driver.")
      .def("__call__", &farskip::launch, py::arg("stream"), py::arg("grid"),
           "Launch on a CUDA stream (its handle), whose context is this thread's, a grid of up to three dimensions, "
           "none empty, with the arguments, tensors for pointers. Raises TypeError for another number of arguments, "
           "ValueError for an integer that does not fit and RuntimeError with the driver's words.");

  module.def("layout", &farskip::layout, py::arg("experts").noconvert(), py::arg("num_experts"),
             "Layout of expert ids (any shape, int32 or int64, -1 for not routed): counts [num_experts] int64, and the "
             "flat indices of the routed entries sorted by expert, [routed] int64, in their own order within one. "
             "Raises ValueError for an id out of range and TypeError for another dtype.");

#ifdef FARSKIP_CUDA
  module.attr("has_cuda") = true;
  module.def("hold", &farskip::checked_hold, py::arg("stream"), py::arg("blocks"), py::arg("microseconds"),
             py::arg("exclusive") = false,
             "Launch `blocks` one-warp thread blocks on a CUDA stream (its handle) that stay resident for that long, "
             "which delays what follows on the stream. With `exclusive` each block also takes all the shared memory of "
             "a multiprocessor of its own, so that nothing that needs shared memory runs beside it.");
#else
  module.attr("has_cuda") = false;
#endif
}

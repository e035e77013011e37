// farskip_fused._C: what Triton cannot do. No libtorch: raw addresses, stream handles and numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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
  using farskip::StatusBlock;
  module.doc() = "What Triton cannot do: host-visible status, routing layout on the CPU, residency on the GPU.";

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

#pragma once
// Checks at an op's door: what was wanted, what came. The same for CPU and CUDA ops; raise RuntimeError in Python.

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace nanoinfer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raise with the parts of the message joined, unless `ok`.
template <typename... Parts>
void require(bool ok, const Parts&... parts) {
    if (ok) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <typename List>
std::string bracketed(const List& values) {
    std::ostringstream text;
    const char* separator = "[";
    for (int64_t value : values) {
        text << separator;
        value < 0 ? text << "any" : text << value;
        separator = ", ";
    }
    text << (values.size() ? "]" : "[]");
    return text.str();
}

// One argument of an op; each method checks one thing and returns the argument, so that checks chain.
class Want {
  public:
    Want(const char* op, const char* name, const Tensor& tensor) : op_(op), name_(name), t_(tensor) {}

    const Want& dtype(std::initializer_list<ScalarType> allowed) const {
        const ScalarType came = t_.scalar_type();
        std::ostringstream wanted;
        for (ScalarType type : allowed) {
            if (type == came) return *this;
            wanted << (wanted.tellp() ? " or " : "") << type;
        }
        fail("dtype ", wanted.str(), came);
        return *this;
    }
    const Want& dtype(ScalarType allowed) const { return dtype({allowed}); }
    const Want& floating() const { return dtype({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}); }

    // -1 stands for any size.
    const Want& shape(std::initializer_list<int64_t> wanted) const {
        bool same = t_.dim() == int64_t(wanted.size());
        int64_t i = 0;
        for (int64_t size : wanted) {
            same = same && (size < 0 || t_.size(i) == size);
            ++i;
        }
        if (!same) fail("shape ", bracketed(wanted), bracketed(t_.sizes()));
        return *this;
    }

    // Dimensions from `first` on are packed without gaps; the strides of those before are free (views of a fused
    // buffer).
    const Want& dense(int64_t first) const {
        int64_t expected = 1;
        for (int64_t i = t_.dim() - 1; i >= first; --i) {
            if (t_.size(i) != 1 && t_.stride(i) != expected && t_.numel() > 0) {
                fail(first ? "packed rows, got strides" : "contiguous memory, got strides", "",
                     bracketed(t_.strides()));
            }
            expected *= t_.size(i);
        }
        return *this;
    }

    const Want& same_device(const Tensor& other) const {
        const auto came = t_.device(), wanted = other.device();
        if (came != wanted) fail("device ", device_text(wanted), device_text(came));
        return *this;
    }

  private:
    static std::string device_text(const torch::stable::Device& device) {
        return device.is_cpu()    ? "cpu"
               : device.is_cuda() ? "cuda:" + std::to_string(device.index())
                                  : "neither cpu nor cuda";
    }

    template <typename Came>
    void fail(const char* what, const std::string& wanted, const Came& came) const {
        require(false, op_, ": ", name_, " must have ", what, wanted, wanted.empty() ? " " : ", got ", came);
    }

    const char* op_;
    const char* name_;
    const Tensor& t_;
};

}  // namespace nanoinfer

// Our delegate in XNNPACK's place: it computes linear layers with quantized weights, straight from the weights in the
// file, and elementwise operations on few numbers; XNNPACK everything else.
#pragma once

namespace crayon {

// The names under which programs find XNNPACK, and us: of the same length, so that one can be written over the other.
constexpr char xnnpack_name[] = "XnnpackBackend", delegate_name[] = "CrayonDelegate";
static_assert(sizeof xnnpack_name == sizeof delegate_name);

// Makes the delegate known to ExecuTorch. Throws Refusal.
void register_delegate();

}  // namespace crayon

#include "table.h"

namespace minisp::MINISP_LEVEL {

extern const Kernels kernels;

// Addresses alone: nothing of a level may run when the library is loaded.
const Kernels kernels = {&activation_backward,
                         &cross_entropy,
                         &norm_rows,
                         &norm_backward_rows,
                         &rotate_tokens,
                         &eliminate_float,
                         &eliminate_double,
                         {&gram_float, &gram_bf16},
                         {&attention_float, &attention_bf16}};

}  // namespace minisp::MINISP_LEVEL

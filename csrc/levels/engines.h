// Which engine multiplies inputs of which type: bfloat16 in pairs where the level has such products, else widened.
#pragma once

#include "float_engine.h"
#include "pair_engine.h"

namespace minisp::MINISP_LEVEL {

#if MINISP_NUMBER >= MINISP_NUMBER_avx512_bf16
using NarrowEngine = PairEngine;
#else
using NarrowEngine = FloatEngine;
#endif

}  // namespace minisp::MINISP_LEVEL

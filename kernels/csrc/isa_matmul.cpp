// Compiled once for each instruction set, into a namespace of its own (see CMakeLists.txt).
#include "dense_matmul.h"
#include "exact_matmul.h"
#include "matmul_kernels.h"
#include "quantize_rows.h"
#include "quantized_matmul.h"

namespace qserve::QSERVE_NAMESPACE {

const MatmulKernels kMatmulKernels = {
    .quantize_rows = quantize_rows,
    .round_rows = round_rows,
    .quantized = {quantized_product<SmallCodes<TwoBits>>, quantized_product<SmallCodes<ThreeBits>>,
                  quantized_product<SmallCodes<FourBits>>, quantized_product<ByteCodes<false>>,
                  quantized_product<ByteCodes<true>>, quantized_product<CodebookCodes>, nullptr},
    .exact = {exact_product<SmallCodes<TwoBits>>, exact_product<SmallCodes<ThreeBits>>, exact_product<SmallCodes<FourBits>>,
              exact_product<ByteCodes<false>>, exact_product<ByteCodes<true>>, exact_product<CodebookCodes>,
              exact_product<Float8Codes>},
    .dense = dense,
};

}  // namespace qserve::QSERVE_NAMESPACE

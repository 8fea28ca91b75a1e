// The largest outputs of a product, found while it is computed.
#pragma once

#include "product.h"

namespace qserve {

// The k largest outputs of each row of x [rows][K], largest first, of equals the first; a NaN is larger than every number.
// ids [rows][k], values [rows][k]. product.out and product.sink are not used; 1 <= k <= outputs.
void find_largest(const Weight& weight, const Product& product, int64_t k, int64_t* ids, float* values);

}  // namespace qserve

// Whether memory is handed out in blocks of exactly the size that is asked for, so that a sanitizer sees what goes past an end.
#pragma once

namespace qserve {

#if defined(QSERVE_SANITIZE)
constexpr bool kExactMemory = true;
#else
constexpr bool kExactMemory = false;
#endif

}  // namespace qserve

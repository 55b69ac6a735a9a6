// Attention over bytes, and over codes that are packed into bytes.
#include "attention.h"

template void jaxkv::Attend<jaxkv::Float8>(Attention&, int64_t);
template void jaxkv::Attend<int8_t>(Attention&, int64_t);
template void jaxkv::Attend<jaxkv::Code>(Attention&, int64_t);

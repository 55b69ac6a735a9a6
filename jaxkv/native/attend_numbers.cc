// Attention over numbers of 16 and 32 bits.
#include "attention.h"

template void jaxkv::Attend<float>(Attention&, int64_t);
template void jaxkv::Attend<jaxkv::BFloat16>(Attention&, int64_t);
template void jaxkv::Attend<jaxkv::Float16>(Attention&, int64_t);

// Large pages for what is read over and over: with small ones a tenth to a fifth of the time that
// reading takes goes into finding out where each page is.
#pragma once
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jaxkv {

// Asks the system, once for each buffer and beside the work, to put it on pages of 2 MiB. A new one
// may lie where another was freed. Where the system cannot (not Linux 6.1 or later, large pages turned
// off, none free) everything stays as it is.
inline void PreferLargePages(const void* data, int64_t bytes, bool is_new = false) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int64_t kWorthwhile = 8 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not name
  static std::mutex mutex;
  static auto* seen = new std::set<std::pair<const void*, int64_t>>;
  if (bytes < kWorthwhile) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!seen->insert({data, bytes}).second && !is_new) return;
  }
  const uintptr_t begin = ((uintptr_t)data + kPage - 1) / kPage * kPage;
  const uintptr_t end = ((uintptr_t)data + bytes) / kPage * kPage;
  // A page at a time, so that whoever else maps memory waits for one only. If the buffer is freed
  // meanwhile, this is an error without consequences.
  const auto collapse = [begin, end] {
    for (uintptr_t page = begin; page < end; page += kPage)
      if (madvise((void*)page, kPage, kCollapse) != 0 && errno != EAGAIN && errno != EBUSY) return;
  };
  try {
    std::thread(collapse).detach();
  } catch (const std::system_error&) {  // no more threads: as it is, then
  }
#endif
}

}  // namespace jaxkv

// Waiting for a request: polls with pauses that grow, without Python's lock. What Poller.wait in comm/poll.py does, but
// that it yields while it spins, whatever `eager` is, and that the first pause is the shortest.

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>

namespace {

// MPI_Test, whatever a request is in this MPI library; no status needs more than STATUS_BYTES.
using Test = int (*)(void* request, int* complete, void* status);
constexpr int STATUS_BYTES = 256;
constexpr double SECOND_NS = 1e9;

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * static_cast<int64_t>(SECOND_NS) + time.tv_nsec;
}

void pause(double seconds) {
  const auto ns = static_cast<int64_t>(seconds * SECOND_NS);
  const timespec time{ns / static_cast<int64_t>(SECOND_NS), ns % static_cast<int64_t>(SECOND_NS)};
  clock_nanosleep(CLOCK_MONOTONIC, 0, &time, nullptr);
}

}  // namespace

// A wait that goes on over several calls: how many polls found nothing, and the pause that comes next, seconds.
struct Wait {
  int64_t spin_until_ns, polls;
  double pause_s;
};

// Poll until `request` is complete, `most_s` have gone by, or `leave`, where it is given, points to what is not 0; the
// result of the last `test`, which is 0 where it went well. `wait` begins as zeros.
extern "C" int shadow_wait(Test test, void* request, Wait* wait, double spin_s, int64_t eager, double shortest_s,
                           double longest_s, double growth, double most_s, int* complete, const int* leave) {
  alignas(16) uint8_t status[STATUS_BYTES];
  const int64_t begun = now_ns(), latest = begun + static_cast<int64_t>(most_s * SECOND_NS);
  if (wait->spin_until_ns == 0) wait->spin_until_ns = begun + static_cast<int64_t>(spin_s * SECOND_NS);
  if (wait->pause_s == 0) wait->pause_s = std::min(shortest_s, longest_s);
  while (true) {
    const int failed = test(request, complete, status);
    if (failed || *complete) return failed;
    const int64_t now = now_ns();
    if (now >= latest || (leave && __atomic_load_n(leave, __ATOMIC_ACQUIRE))) return 0;
    if (now < wait->spin_until_ns || ++wait->polls < eager) {
      sched_yield();
    } else {
      pause(wait->pause_s);
      wait->pause_s = std::min(longest_s, wait->pause_s * growth);
    }
  }
}

// A delay line: takes frames off two interfaces and puts each on the other one after a latency, in order, or drops it.
//
// Frames are those of packet sockets with PACKET_VNET_HDR: up to 64 KiB of one TCP stream pass as one, with a header
// that says how to cut them. Loss is drawn for each packet that a wire would carry: of a frame that loses some, the
// runs between them are sent. The first error ends the line.

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>

namespace {

// linux/virtio_net.h, which is no C++.
struct Offload {
  uint8_t flags, kind;
  uint16_t head_bytes, packet_bytes, sum_begins, sum_at;
};
constexpr uint8_t ONE_PACKET = 0, TCP_OVER_IPV4 = 1, WITH_ECN = 0x80;

constexpr int64_t MOST_FRAME_BYTES = sizeof(Offload) + ETH_HLEN + 65536 + 64;
constexpr int64_t SECOND_NS = 1000000000;
constexpr int64_t LATE_NS = 20000;  // what a timer is late by, about
constexpr int64_t MOST_EARLY_NS = 100000;
constexpr int64_t MOST_SLEEP_NS = 1000000;  // so that what comes meanwhile fits into the socket
constexpr int MOST_AT_ONCE = 1024;

int64_t now_ns(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec * SECOND_NS + time.tv_nsec;
}

void sleep_until(int64_t time_ns) {
  const timespec time{time_ns / SECOND_NS, time_ns % SECOND_NS};
  clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, nullptr);
}

// Packets drawn one by one, as gaps between lost ones.
class Losses {
 public:
  Losses(double share, uint64_t seed) : share_(share), random_(seed) { draw(); }

  // Whether none of the next `packets` is lost; they are taken only then.
  bool spare(int64_t packets) {
    if (gap_ < packets) return false;
    gap_ -= packets;
    return true;
  }

  bool lose() {
    if (spare(1)) return false;
    draw();
    return true;
  }

 private:
  void draw() {
    if (share_ <= 0) gap_ = INT64_MAX;
    else if (share_ >= 1) gap_ = 0;
    else gap_ = std::geometric_distribution<int64_t>(share_)(random_);
  }

  double share_;
  std::mt19937_64 random_;
  int64_t gap_ = 0;
};

// Frames in order of their time, back to back in a ring of a bounded number of bytes; pages that it never reached are
// never there.
class Queue {
 public:
  explicit Queue(int64_t capacity) : capacity_(std::max(capacity, 4 * MOST_FRAME_BYTES)) {
    void* memory = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory_ = memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
  }
  ~Queue() { if (memory_) munmap(memory_, capacity_); }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  bool made() const { return memory_ != nullptr; }
  bool empty() const { return frames_ == 0; }
  int64_t due_ns() const { return head()->due_ns; }
  const uint8_t* frame() const { return memory_ + begin_ + sizeof(Entry); }
  int64_t bytes() const { return head()->bytes; }

  // Room for one more frame of any size; nullptr: the queue is full.
  uint8_t* room() {
    const int64_t needed = sizeof(Entry) + MOST_FRAME_BYTES + sizeof(Entry);
    if (empty()) begin_ = end_ = 0;
    if (empty() || begin_ < end_) {
      if (capacity_ - end_ < needed) {
        if (begin_ <= needed) return nullptr;
        entry(end_)->bytes = WRAPPED;
        end_ = 0;
      }
    } else if (begin_ - end_ <= needed) {
      return nullptr;
    }
    return memory_ + end_ + sizeof(Entry);
  }

  // Keep the frame that was written into room().
  void keep(int64_t due_ns, int64_t bytes) {
    *entry(end_) = {due_ns, bytes};
    end_ += stride(bytes);
    ++frames_;
  }

  void drop() {
    begin_ += stride(head()->bytes);
    --frames_;
    if (!empty() && begin_ != end_ && entry(begin_)->bytes == WRAPPED) begin_ = 0;
  }

 private:
  struct Entry {
    int64_t due_ns, bytes;
  };
  static constexpr int64_t WRAPPED = -1;
  static int64_t stride(int64_t bytes) { return (sizeof(Entry) + bytes + 15) / 16 * 16; }
  Entry* entry(int64_t at) const { return reinterpret_cast<Entry*>(memory_ + at); }
  const Entry* head() const { return entry(begin_); }

  int64_t capacity_, begin_ = 0, end_ = 0, frames_ = 0;
  uint8_t* memory_ = nullptr;
};

uint16_t folded(uint64_t sum) {
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<uint16_t>(sum);
}

uint64_t sum_of(const void* data, int64_t bytes) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes; i += 2) {
    uint16_t word;
    std::memcpy(&word, static_cast<const uint8_t*>(data) + i, 2);
    sum += word;
  }
  return sum;
}

// A frame of several TCP packets over IPv4: where its headers and its bytes are.
struct Train {
  explicit Train(uint8_t* frame, int64_t bytes) {
    const auto* offload = reinterpret_cast<const Offload*>(frame);
    const int64_t ip_at = sizeof(Offload) + ETH_HLEN;
    if ((offload->kind & ~WITH_ECN) != TCP_OVER_IPV4 || offload->packet_bytes == 0) return;
    ip_bytes = reinterpret_cast<const iphdr*>(frame + ip_at)->ihl * 4;
    tcp_bytes = reinterpret_cast<const tcphdr*>(frame + ip_at + ip_bytes)->doff * 4;
    head_bytes = ip_at + ip_bytes + tcp_bytes;
    if (head_bytes >= bytes) return;
    packet_bytes = offload->packet_bytes;
    payload_bytes = bytes - head_bytes;
    packets = (payload_bytes + packet_bytes - 1) / packet_bytes;
  }

  // Write packets [first, last) of `frame` as a frame of their own; return its bytes.
  int64_t cut(const uint8_t* frame, int64_t first, int64_t last, uint8_t* out) const {
    const int64_t skipped = first * packet_bytes, bytes = std::min(last * packet_bytes, payload_bytes) - skipped;
    std::memcpy(out, frame, head_bytes);
    std::memcpy(out + head_bytes, frame + head_bytes + skipped, bytes);
    auto* ip = reinterpret_cast<iphdr*>(out + sizeof(Offload) + ETH_HLEN);
    ip->tot_len = htons(ip_bytes + tcp_bytes + bytes);
    ip->id = htons(ntohs(ip->id) + first);
    ip->check = 0;
    ip->check = ~folded(sum_of(ip, ip_bytes));
    auto* tcp = reinterpret_cast<tcphdr*>(reinterpret_cast<uint8_t*>(ip) + ip_bytes);
    tcp->seq = htonl(ntohl(tcp->seq) + skipped);
    if (last < packets) tcp->fin = tcp->psh = 0;
    auto* offload = reinterpret_cast<Offload*>(out);
    if (first > 0) out[sizeof(Offload) + ETH_HLEN + ip_bytes + 13] &= 0x7f;  // CWR: on the first packet only
    if (last - first == 1) offload->kind = ONE_PACKET, offload->packet_bytes = 0;
    // What the checksum begins with is the sum of addresses, protocol and length; the receiver adds the rest.
    tcp->check = folded(sum_of(&ip->saddr, 8) + htons(IPPROTO_TCP) + htons(tcp_bytes + bytes));
    return head_bytes + bytes;
  }

  int64_t ip_bytes = 0, tcp_bytes = 0, head_bytes = 0, packet_bytes = 0, payload_bytes = 0, packets = 1;
};

// One direction.
class Way {
 public:
  Way(int from, int to, int64_t latency_ns, double loss, uint64_t seed, int64_t capacity)
      : from_(from), to_(to), latency_ns_(latency_ns), losses_(loss, seed), queue_(capacity) {}

  bool made() const { return queue_.made(); }
  bool idle() const { return queue_.empty(); }
  int64_t due_ns() const { return idle() ? INT64_MAX : queue_.due_ns(); }

  void send_due(int64_t until) {
    while (!queue_.empty() && queue_.due_ns() <= until) {
      send(to_, queue_.frame(), queue_.bytes(), MSG_DONTWAIT);  // fails where the next link is full: a loss as there
      queue_.drop();
    }
  }

  // Take what has come; 0, or the error.
  int take() {
    for (int i = 0; i < MOST_AT_ONCE; ++i) {
      uint8_t* room = queue_.room();
      uint8_t* place = room ? room : spare_;
      iovec vector{place, static_cast<size_t>(MOST_FRAME_BYTES)};
      alignas(cmsghdr) uint8_t control[CMSG_SPACE(sizeof(timespec)) + 64];
      msghdr message{};
      message.msg_iov = &vector, message.msg_iovlen = 1;
      message.msg_control = control, message.msg_controllen = sizeof control;
      const int64_t bytes = recvmsg(from_, &message, MSG_DONTWAIT);
      if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
      if (bytes < 0 && errno == EINVAL) continue;  // a kind of frame that has no such header: lost
      if (bytes < 0) return errno;
      if (room) keep(room, bytes, now_ns(CLOCK_MONOTONIC) + latency_ns_ - age_ns(message));
    }
    return 0;
  }

 private:
  // How long ago the frame came: this process may have woken up late.
  int64_t age_ns(msghdr& message) const {
    for (cmsghdr* part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
      if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SO_TIMESTAMPNS) continue;
      timespec came;
      std::memcpy(&came, CMSG_DATA(part), sizeof came);
      const int64_t age = now_ns(CLOCK_REALTIME) - came.tv_sec * SECOND_NS - came.tv_nsec;
      return age < 0 ? 0 : std::min(age, latency_ns_);
    }
    return 0;
  }

  void keep(uint8_t* room, int64_t bytes, int64_t due_ns) {
    const Train train(room, bytes);
    if (losses_.spare(train.packets)) return queue_.keep(due_ns, bytes);
    std::memcpy(spare_, room, bytes);
    for (int64_t first = 0, next = 0; next <= train.packets; ++next) {
      if (next < train.packets && !losses_.lose()) continue;
      if (next > first && (room = queue_.room())) keep_cut(train, first, next, room, bytes, due_ns);
      first = next + 1;
    }
  }

  void keep_cut(const Train& train, int64_t first, int64_t last, uint8_t* room, int64_t bytes, int64_t due_ns) {
    if (train.packets > 1) bytes = train.cut(spare_, first, last, room);
    else std::memcpy(room, spare_, bytes);
    queue_.keep(due_ns, bytes);
  }

  int from_, to_;
  int64_t latency_ns_;
  Losses losses_;
  Queue queue_;
  uint8_t spare_[MOST_FRAME_BYTES];
};

}  // namespace

// Carry frames between packet sockets `near` and `far` until one fails; return the error's number. `capacity` is the
// most bytes under way in each direction, `loss` a share from 0 to 1.
extern "C" int shadow_delay_line(int near, int far, int64_t latency_ns, double loss, uint64_t seed, int64_t capacity) {
  auto* up = new Way(near, far, latency_ns, loss, seed, capacity);
  auto* down = new Way(far, near, latency_ns, loss, ~seed, capacity);
  if (!up->made() || !down->made()) return ENOMEM;
  pollfd ends[2] = {{near, POLLIN, 0}, {far, POLLIN, 0}};
  const int64_t early_ns = std::max(LATE_NS, std::min(latency_ns / 10, MOST_EARLY_NS));
  while (true) {
    const bool idle = up->idle() && down->idle();
    if (idle && poll(ends, 2, -1) < 0 && errno != EINTR) return errno;
    const int64_t latest = now_ns(CLOCK_MONOTONIC) + MOST_SLEEP_NS;
    if (!idle) sleep_until(std::min({up->due_ns() - LATE_NS, down->due_ns() - LATE_NS, latest}));
    for (Way* way : {up, down}) if (const int error = way->take()) return error;
    const int64_t until = now_ns(CLOCK_MONOTONIC) + early_ns;
    up->send_due(until);
    down->send_due(until);
  }
}

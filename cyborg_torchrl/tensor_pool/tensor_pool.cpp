// Where torch's large CPU tensors lie. See tensor_pool/__init__.py.
//
// One stretch of addresses as large as the machine's memory, cut into ranges that are in use or free; pages that were
// never touched take no memory. A tensor gets the lowest free range that it fits into (first fit in order of address),
// neighbours that are free are joined, and small blocks, which are the default allocator's, are never put in between: the
// same tensors, let go in the same order, lie in the same places again.

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include <c10/core/CPUAllocator.h>

namespace {

constexpr size_t SMALLEST = 64 * 1024;  // bytes of a tensor that is kept here
// Tensors are often multiples of a page long. Without a gap each would begin at the same place of its page, and a load
// of one would wait for stores to the others, whose addresses end in the same bits.
constexpr size_t ALIGNMENT = 64, GAP = 3 * ALIGNMENT;

constexpr uintptr_t up(uintptr_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

bool is_limited(int resource) {
    rlimit limit;
    return getrlimit(resource, &limit) || limit.rlim_cur != RLIM_INFINITY;
}

class Pool {
  public:
    // Whether there is room: where addresses are limited (ulimit -v, -d), they would be taken from the rest of the
    // process. Where the system promises no more than it has (vm.overcommit_memory = 2), addresses count as memory, and
    // all of them would be taken from other programs.
    bool reserve() {
        const std::lock_guard<std::mutex> guard(mutex);
        int overcommit = 0;
        if (std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit && overcommit == 2) return false;
        if (is_limited(RLIMIT_AS) || is_limited(RLIMIT_DATA)) return false;
        page_ = size_t(sysconf(_SC_PAGESIZE));
        const size_t size = page_ * size_t(sysconf(_SC_PHYS_PAGES));
        void* got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) return false;
        begin_ = touched_ = reached_ = reinterpret_cast<uintptr_t>(got);
        end_ = begin_ + size;
        free_.emplace(begin_, size);
        return true;
    }

    // nullptr where it does not fit.
    void* take(size_t asked) {
        if (asked > end_ - begin_) return nullptr;
        const size_t size = up(asked, ALIGNMENT) + GAP;
        const std::lock_guard<std::mutex> guard(mutex);
        const auto at = std::find_if(free_.begin(), free_.end(), [size](const auto& each) { return each.second >= size; });
        if (at == free_.end()) return nullptr;
        const uintptr_t address = at->first;
        const size_t rest = at->second - size;
        used_.emplace(address, size);
        auto node = free_.extract(at);
        if (rest) {
            node.key() = address + size, node.mapped() = rest;
            free_.insert(std::move(node));
        }
        in_use_ += size;
        reached_ = std::max(reached_, address + size);
        touched_ = std::max(touched_, address + size);
        return reinterpret_cast<void*>(address);
    }

    bool holds(const void* data) const {
        const auto address = reinterpret_cast<uintptr_t>(data);
        return begin_ <= address && address < end_;
    }

    // Allocates nothing itself: it may be memory that is short.
    void give_back(void* data) {
        const std::lock_guard<std::mutex> guard(mutex);
        auto node = used_.extract(reinterpret_cast<uintptr_t>(data));
        if (node.empty()) return;
        in_use_ -= node.mapped();
        auto next = free_.lower_bound(node.key());
        if (next != free_.end() && next->first == node.key() + node.mapped()) {
            node.mapped() += next->second;
            next = free_.erase(next);
        }
        if (next != free_.begin())
            if (const auto before = std::prev(next); before->first + before->second == node.key()) {
                before->second += node.mapped();
                return;
            }
        free_.insert(next, std::move(node));
    }

    // Gives pages back to the system: those that no tensor lay on since the last call and that lie above all that did,
    // or all on which none lies. Returns how many bytes.
    size_t release(bool all) {
        const std::lock_guard<std::mutex> guard(mutex);
        uintptr_t used_to = end_;
        if (const auto last = free_.rbegin(); last != free_.rend() && last->first + last->second == end_)
            used_to = last->first;
        size_t released = 0;
        if (all)
            for (const auto& [address, size] : free_)
                if (address < used_to) released += discard(address, address + size);
        const uintptr_t from = all ? used_to : reached_;
        if (from < touched_) released += discard(from, touched_);
        touched_ = std::max(used_to, std::min(touched_, from));
        reached_ = used_to;
        return released;
    }

    size_t in_use() {
        const std::lock_guard<std::mutex> guard(mutex);
        return in_use_;
    }

    std::mutex mutex;

  private:
    size_t discard(uintptr_t from, uintptr_t to) const {
        from = up(from, page_), to = to / page_ * page_;
        if (from >= to || madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED)) return 0;
        return to - from;
    }

    std::map<uintptr_t, size_t> free_, used_;  // sizes by address: together all of it, and no two free ones side by side
    size_t page_ = 0, in_use_ = 0;
    uintptr_t begin_ = 0, end_ = 0, touched_ = 0, reached_ = 0;  // how far tensors lay: ever, and since the last release
};

Pool& pool() {
    static Pool* const the = new Pool;  // never destroyed: tensors may outlive it
    return *the;
}

c10::Allocator* others = nullptr;
c10::DeleterFnPtr give_back_to_others = nullptr;

void give_back(void* data) {
    if (!pool().holds(data)) return give_back_to_others(data);
    c10::profiledCPUMemoryReporter().Delete(data);
    pool().give_back(data);
}

class Allocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t size) override {
        void* data = size < SMALLEST ? nullptr : pool().take(size);
        if (data != nullptr)
            c10::profiledCPUMemoryReporter().New(data, size);
        else
            data = others->raw_allocate(size);
        return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

bool install() {
    others = c10::GetCPUAllocator(), give_back_to_others = others->raw_deleter();
    if (others != c10::GetDefaultCPUAllocator() || give_back_to_others == nullptr || !pool().reserve()) return false;
    // a child that is forked while another thread holds the lock would wait for ever
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    auto* const ours = new Allocator;
    c10::SetCPUAllocator(ours);
    return c10::GetCPUAllocator() == ours;
}

}  // namespace

extern "C" {

const char* cyborg_pool_built_for() { return BUILT_FOR; }

// Whether tensors come from the pool from now on; nothing is done a second time.
bool cyborg_pool_install() {
    static const bool is_installed = install();
    return is_installed;
}

size_t cyborg_pool_release(bool all) { return pool().release(all); }
size_t cyborg_pool_in_use() { return pool().in_use(); }

}

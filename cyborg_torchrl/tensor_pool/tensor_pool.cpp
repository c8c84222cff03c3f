// Where torch's large CPU tensors lie. See tensor_pool/__init__.py.
//
// One stretch of addresses as large as the machine's memory, cut into ranges that are in use or free; pages that were
// never touched take no memory. A tensor gets the lowest free range that it fits into (first fit in order of address),
// neighbours that are free are joined, and small blocks, which are the default allocator's, are never put in between: the
// same tensors, let go in the same order, lie in the same places again.

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#include <c10/core/CPUAllocator.h>

namespace {

constexpr size_t SMALLEST = 64 * 1024;  // bytes of a tensor that is kept here
// Tensors are often multiples of a page long. Without a gap each would begin at the same place of its page, and a load
// of one would wait for stores to the others, whose addresses end in the same bits.
constexpr size_t ALIGNMENT = 64, GAP = 3 * ALIGNMENT;

constexpr uintptr_t up(uintptr_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

struct Range {
    size_t size;
    bool is_free;
};

class Pool {
  public:
    // Whether there is room: a limit on addresses (ulimit -v) may forbid it. Where the system promises no more than it
    // has (vm.overcommit_memory = 2), addresses count as memory, and all of them would be taken from other programs.
    bool reserve() {
        int overcommit = 0;
        if (std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit && overcommit == 2) return false;
        page_ = size_t(sysconf(_SC_PAGESIZE));
        const size_t size = page_ * size_t(sysconf(_SC_PHYS_PAGES));
        void* got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) return false;
        begin_ = touched_ = reached_ = reinterpret_cast<uintptr_t>(got);
        end_ = begin_ + size;
        ranges_.emplace(begin_, Range{size, true});
        return true;
    }

    // nullptr where it does not fit.
    void* take(size_t asked) {
        const size_t size = up(asked, ALIGNMENT) + GAP;
        const std::lock_guard<std::mutex> guard(mutex);
        const auto fits = [size](const auto& each) { return each.second.is_free && each.second.size >= size; };
        const auto at = std::find_if(ranges_.begin(), ranges_.end(), fits);
        if (at == ranges_.end()) return nullptr;
        auto& [address, range] = *at;
        if (range.size > size) ranges_.emplace_hint(std::next(at), address + size, Range{range.size - size, true});
        range = {size, false};
        in_use_ += size;
        reached_ = std::max(reached_, address + size);
        touched_ = std::max(touched_, address + size);
        return reinterpret_cast<void*>(address);
    }

    bool holds(const void* data) const {
        const auto address = reinterpret_cast<uintptr_t>(data);
        return begin_ <= address && address < end_;
    }

    void give_back(void* data) {
        const std::lock_guard<std::mutex> guard(mutex);
        auto at = ranges_.find(reinterpret_cast<uintptr_t>(data));
        if (at == ranges_.end() || at->second.is_free) return;
        in_use_ -= at->second.size;
        at->second.is_free = true;
        join(at);
        if (at != ranges_.begin() && std::prev(at)->second.is_free) join(std::prev(at));
    }

    // Gives pages back to the system: those that no tensor lay on since the last call and that lie above all that did,
    // or all on which none lies. Returns how many bytes.
    size_t release(bool all) {
        const std::lock_guard<std::mutex> guard(mutex);
        if (ranges_.empty()) return 0;  // not reserved
        const auto last = std::prev(ranges_.end());
        const uintptr_t used_to = last->second.is_free ? last->first : end_;
        size_t released = 0;
        if (all)
            for (auto at = ranges_.begin(); at != last; ++at)
                if (at->second.is_free) released += discard(at->first, at->first + at->second.size);
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
    // With the next one, if that is free, too.
    void join(std::map<uintptr_t, Range>::iterator at) {
        const auto next = std::next(at);
        if (next == ranges_.end() || !next->second.is_free) return;
        at->second.size += next->second.size;
        ranges_.erase(next);
    }

    size_t discard(uintptr_t from, uintptr_t to) const {
        from = up(from, page_), to = to / page_ * page_;
        if (from >= to || madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED)) return 0;
        return to - from;
    }

    std::map<uintptr_t, Range> ranges_;  // by address, without gaps
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

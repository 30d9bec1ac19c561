// The fibers of the emulator: one block at a time, its threads in turn.
#include "emulator.h"
#include "emulator_hopper.h"

#include <ucontext.h>

namespace emu {
u8* shared;
int current, block, blocks, threads, block_count;
u64 block_generation;
std::vector<Warp> warps;
std::vector<std::vector<std::pair<void*, const void*>>> under_way;
Named named[16];

static ucontext_t home;
static std::vector<ucontext_t> fibers;
static std::vector<u8*> stacks;
static std::vector<bool> done;
static int left;
static const size_t STACK = 64 << 10;

typedef void (*Kernel)(u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64);
static Kernel kernel;
static u64* args;

static int next_alive() {
  int i = current;
  do i = (i + 1) % threads;
  while (done[i]);
  return i;
}

void yield() {
  const int from = current, to = next_alive();
  if (to == from) return;
  current = to;
  swapcontext(&fibers[from], &fibers[to]);
}

static void body() {
  u64* a = args;
  kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17],
         a[18], a[19]);
  done[current] = true;
  if (--left == 0) {
    setcontext(&home);
  }
  current = next_alive();
  setcontext(&fibers[current]);
}
}  // namespace emu

extern "C" void emulate(void* fn, int grid, int block_threads, int shared_bytes, u64* args) {
  using namespace emu;
  kernel = (Kernel)fn, emu::args = args, blocks = grid, threads = block_threads;
  while ((int)stacks.size() < threads)
    stacks.push_back((u8*)mmap(0, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::vector<u8> memory(shared_bytes + 256);
  shared = (u8*)(((uintptr_t)memory.data() + 127) & ~(uintptr_t)127);
  for (block = 0; block < grid; block++) {
    memset(shared, 0xff, shared_bytes);  // NaN everywhere: what is read was written
    fibers.assign(threads, ucontext_t());
    done.assign(threads, false);
    warps.assign((threads + 31) / 32, Warp());
    under_way.assign(threads, {});
    left = threads, block_count = 0;
    for (Named& n : named) n = Named();
    for (int i = 0; i < threads; i++) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i];
      fibers[i].uc_stack.ss_size = STACK;
      fibers[i].uc_link = &home;
      makecontext(&fibers[i], body, 0);
    }
    current = 0;
    swapcontext(&home, &fibers[0]);
  }
}

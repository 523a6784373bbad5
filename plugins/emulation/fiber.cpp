// Switching stacks by hand on x86-64, where ucontext would cost two system calls; ucontext
// elsewhere, and where VSSM_EMULATION_UCONTEXT asks for it. AddressSanitizer is told of every
// switch.
#include "plugins/emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(VSSM_EMULATION_UCONTEXT)
#define VSSM_OWN_SWITCH
extern "C" void vssm_switch_stack(void** from, void* to);
// Saves the registers that a callee must keep, and the stack, in *from; takes up what `to` saved.
asm(R"(
.text
.type vssm_switch_stack, @function
vssm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vssm_switch_stack, .-vssm_switch_stack
)");
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vssm::emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

Fiber* running = nullptr;
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;

void before_switch([[maybe_unused]] void** saved, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(saved, stack, bytes);
#endif
}

void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] bool inside) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, inside ? &host_stack : nullptr,
                                  inside ? &host_stack_bytes : nullptr);
#endif
}

/// The lowest page stays closed, so that an overflow stops there.
char* map_stack() {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (mprotect(memory, page, PROT_NONE) == 0) return static_cast<char*>(memory);
  munmap(memory, kStackBytes);
  return nullptr;
}

}  // namespace

Fiber::~Fiber() {
#if !defined(VSSM_OWN_SWITCH)
  delete static_cast<ucontext_t*>(inside_);
  delete static_cast<ucontext_t*>(outside_);
#endif
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

bool Fiber::start(Body body, void* argument) {
  if (stack_ == nullptr) stack_ = map_stack();
  if (stack_ == nullptr) return false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  body_ = body;
  argument_ = argument;
  fake_stack_ = nullptr;
#if defined(VSSM_OWN_SWITCH)
  // What vssm_switch_stack takes up: six registers, then the address it returns to, placed so that
  // the stack is aligned as after a call.
  void* frame[8] = {};
  void (*const entry)() = run;
  std::memcpy(&frame[6], &entry, sizeof(entry));
  inside_ = stack_ + kStackBytes - sizeof(frame);
  std::memcpy(inside_, frame, sizeof(frame));
#else
  if (inside_ == nullptr) inside_ = new ucontext_t;
  if (outside_ == nullptr) outside_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(inside_);
  if (getcontext(context) != 0) return false;
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, run, 0);
#endif
  return true;
}

void Fiber::resume() {
  running = this;
  void* saved = nullptr;
  before_switch(&saved, stack_, kStackBytes);
#if defined(VSSM_OWN_SWITCH)
  vssm_switch_stack(&outside_, inside_);
#else
  swapcontext(static_cast<ucontext_t*>(outside_), static_cast<ucontext_t*>(inside_));
#endif
  after_switch(saved, false);
}

void Fiber::suspend() {
  before_switch(&fake_stack_, host_stack, host_stack_bytes);
  leave();
  after_switch(fake_stack_, true);
}

/// Goes back to who resumed; returns when resumed again.
void Fiber::leave() {
#if defined(VSSM_OWN_SWITCH)
  vssm_switch_stack(&inside_, outside_);
#else
  swapcontext(static_cast<ucontext_t*>(inside_), static_cast<ucontext_t*>(outside_));
#endif
}

void Fiber::run() {
  after_switch(nullptr, true);
  Fiber* const self = running;
  self->body_(self->argument_);
  before_switch(nullptr, host_stack, host_stack_bytes);  // this stack is done with
  self->leave();
  __builtin_unreachable();
}

}  // namespace vssm::emulation

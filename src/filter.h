#ifndef FILTER_H
#define FILTER_H
/*
 * The system-call filter of a running VM, and of a tool that reads images: what they may call is written down here and, for what only one CPU's
 * Linux has, in src/arch/<cpu>/filter.c; filter.c makes the program. All else kills the process.
 */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>

/* A call that may be made: always (no test), or if its test, BPF that starts with an argument, says so. */
struct call_rule {
	unsigned nr, n;
	const struct sock_filter *test; /* n instructions; falling off the end: no */
};

enum filter_of { FILTER_VM, FILTER_TOOL };

/*
 * Filter the calls of all threads from now on, a running VM's or an image tool's; log: let through and report what would be killed. The threads
 * have no_new_privs. 0 or -errno. Main thread.
 */
int filter_load(enum filter_of which, bool log);

/* ---- words for tables of rules ---- */

#define CALL(name)       { __NR_##name, 0, NULL }
#define CALL_IF(name, ...)                                                                         \
	{ __NR_##name, sizeof((struct sock_filter[]){ __VA_ARGS__ }) / sizeof(struct sock_filter), \
		(const struct sock_filter[]){ __VA_ARGS__ } }

/* A test loads the low half of an argument and asks about it. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "which half of an argument comes first is known for little-endian hosts only"
#endif
#define ARG_AT(at)       BPF_STMT(BPF_LD | BPF_W | BPF_ABS, at)
#define ARG(i)           ARG_AT(offsetof(struct seccomp_data, args[i]))
#define ARG_HIGH(i)      ARG_AT(offsetof(struct seccomp_data, args[i]) + 4)
#define TO_YES           0xff   /* as the length of a jump: put in by filter.c */
#define IS(value)        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(value), TO_YES, 0)
#define HAS_NO(bits)     BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (unsigned)(bits), 0, TO_YES)
#define IGNORE(bits)     BPF_STMT(BPF_ALU | BPF_AND | BPF_K, ~(unsigned)(bits))
#define IS_NULL(i)       ARG(i), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2), ARG_HIGH(i), IS(0)
#define FAILS(err)       BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (err))
/* Stands for our own process id, which no process has. */
#define OWN_PID          0x7ffffffeu

/* ---- the calls that Linux has on every CPU; nothing here opens, connects, executes or finds by name ---- */

/* files: data on descriptors opened before */
#define FILE_CALLS                                                                                 \
	CALL(read), CALL(write), CALL(readv), CALL(writev), CALL(pread64), CALL(pwrite64),         \
	CALL(preadv), CALL(pwritev), CALL(preadv2), CALL(pwritev2), CALL(fsync), CALL(fdatasync),  \
	CALL(fallocate), CALL(ftruncate), CALL(lseek), CALL(close), CALL(fstat), CALL(sendmsg), CALL(recvmsg),      \
	CALL_IF(newfstatat, ARG(3), IS(AT_EMPTY_PATH))

/* devices, disks and chardevs */
#define DATA_CALLS                                                                                 \
	FILE_CALLS, CALL(sendmmsg), CALL(recvmmsg), CALL(recvfrom), CALL(accept4), CALL(shutdown), \
	CALL_IF(sendto, IS_NULL(4)),                                                               \
	CALL_IF(fcntl, ARG(1), IS(F_GETFD), IS(F_GETFL))

/* an image tool: also the size of a file, what it lies on, and image locks */
#define TOOL_CALLS                                                                                 \
	FILE_CALLS, CALL(fstatfs), CALL(futex), CALL(clock_gettime),              \
	CALL(clock_nanosleep), CALL(sched_yield), CALL(getrandom), CALL(exit_group), CALL(dup),    \
	CALL_IF(statx, ARG(2), IS(AT_EMPTY_PATH)),                                                 \
	CALL_IF(fcntl, ARG(1), IS(F_GETFD), IS(F_GETFL), IS(F_OFD_SETLK), IS(F_OFD_GETLK))

/* the loops, and main's wait */
#define LOOP_CALLS                                                                                 \
	CALL(io_uring_enter), CALL(epoll_pwait), CALL(epoll_pwait2), CALL(epoll_ctl), CALL(ppoll), \
	CALL(futex), CALL(clock_gettime), CALL(gettimeofday), CALL(clock_nanosleep),               \
	CALL(nanosleep), CALL(sched_yield),                                                        \
	CALL_IF(io_uring_register, ARG(1), IS(IORING_UNREGISTER_RING_FDS))

/* memory: none that can be executed */
#define MEMORY_CALLS                                                                               \
	CALL(brk), CALL(munmap), CALL(mremap), CALL(madvise),                                      \
	CALL_IF(mmap, ARG(2), HAS_NO(PROT_EXEC)),                                                  \
	CALL_IF(mprotect, ARG(2), HAS_NO(PROT_EXEC))

/* workers: threads and nothing else; clone3 hides its flags behind a pointer, and libc does without */
#define THREAD_CALLS                                                                               \
	CALL_IF(clone, ARG(0),                                                                     \
		IGNORE(CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID), \
		IS(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD)),             \
	CALL_IF(clone3, FAILS(ENOSYS)),                                                            \
	CALL_IF(prctl, ARG(0), IS(PR_SET_NAME)),                                                   \
	CALL(set_robust_list), CALL(rseq), CALL(gettid), CALL(getpid), CALL(exit)

/* signals, to ourselves */
#define SIGNAL_CALLS                                                                               \
	CALL_IF(tgkill, ARG(0), IS(OWN_PID)),                                                      \
	CALL(rt_sigprocmask), CALL(rt_sigaction), CALL(rt_sigreturn), CALL(restart_syscall)

/* virtio-rng; the result; the disassembler's pipes; the spawner's end; ours */
#define OTHER_CALLS                                                                                \
	CALL(getrandom), CALL(getrusage), CALL(pipe2), CALL(wait4), CALL(exit_group)

/* ioctl on every CPU: interrupts and doorbells as guests set them up; terminals; discard on block devices */
#define COMMON_REQUESTS                                                                            \
	IS(KVM_IRQFD), IS(KVM_IRQ_LINE), IS(KVM_IOEVENTFD), IS(KVM_SET_GSI_ROUTING),               \
	IS(KVM_GET_MP_STATE), IS(KVM_SET_MP_STATE), IS(KVM_GET_VCPU_EVENTS),                       \
	IS(KVM_SET_VCPU_EVENTS), IS(TCGETS), IS(TCSETS), IS(TIOCGWINSZ), IS(BLKDISCARD)

/* of an image tool: what a block device is, and discard on it */
#define TOOL_REQUESTS                                                                              \
	IS(BLKGETSIZE64), IS(BLKPBSZGET), IS(BLKSSZGET), IS(BLKDISCARD), IS(TCGETS)
#endif

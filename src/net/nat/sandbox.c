#include "net/nat/sandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <malloc.h>
#include <seccomp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "vmm/cleanup.h"

#define MAX_FILES 8192          /* bounds the connections of a guest: one descriptor each */
#define NOBODY    65534
#define RESOLV    "/etc/resolv.conf"

void nat_limit(void)
{
	struct rlimit files = { MAX_FILES, MAX_FILES }, core = { 0, 0 }, now;

	if (!getrlimit(RLIMIT_NOFILE, &now) && now.rlim_max < MAX_FILES)
		files.rlim_cur = files.rlim_max = now.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	setrlimit(RLIMIT_CORE, &core);
	prctl(PR_SET_DUMPABLE, 0);
}

/* ---- identity and capabilities ------------------------------------------------------------------ */

/* Of root only the network access of an ordinary user is needed. In a user namespace there may be no other uid. */
static void drop_identity(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { 0 };

	for (int cap = 0; cap < 64; cap++)
		prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (geteuid() == 0) {
		int left = setgroups(0, NULL);

		left |= setresgid(NOBODY, NOBODY, NOBODY);
		left |= setresuid(NOBODY, NOBODY, NOBODY);
		(void)left;     /* what could not be changed is without capabilities all the same */
	}
	syscall(SYS_capset, &head, none);
	prctl(PR_SET_DUMPABLE, 0);
	/* Cleared by a change of identity. The spawner has one thread, so this is about the process. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

/* ---- files: Landlock (Linux 5.13 and later), by number: libc has no wrappers --------------------- */

#define LL_CREATE_RULESET  444
#define LL_ADD_RULE        445
#define LL_RESTRICT_SELF   446
#define LL_VERSION         1u           /* flag of the first: tell the ABI */
#define LL_PATH_BENEATH    1
#define LL_READ_FILE       (1ull << 2)
#define LL_READ_DIR        (1ull << 3)

struct ll_ruleset {
	uint64_t files, net, scoped;    /* ABI 1, 4, 6 */
};
struct ll_path {
	uint64_t allowed;
	int32_t fd;
} __attribute__((packed));

static bool ll_allow(int rules, const char *path)
{
	auto_close int fd = open(path, O_PATH | O_CLOEXEC);
	struct ll_path p = { LL_READ_FILE, fd };

	return fd >= 0 && !syscall(LL_ADD_RULE, rules, LL_PATH_BENEATH, &p, 0);
}

/*
 * /etc/resolv.conf itself and, where it is a link to a place of its own under /run, that directory, since
 * the file there is replaced rather than written.
 */
static void ll_allow_resolver(int rules)
{
	auto_free char *real = realpath(RESOLV, NULL);
	char *slash = real ? strrchr(real, '/') : NULL;

	ll_allow(rules, RESOLV);
	if (slash && !strncmp(real, "/run/", 5) && slash > real + 5) {
		*slash = '\0';
		ll_allow(rules, real);
	}
}

static void deny_files(void)
{
	/* Rights known since each ABI; the kernel refuses bits newer than itself. */
	static const uint64_t rights[] = { 0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff };
	long abi = syscall(LL_CREATE_RULESET, NULL, 0, LL_VERSION);
	struct ll_ruleset r = { 0 };
	auto_close int rules = -1;

	if (abi < 1)
		return;
	r.files = rights[MIN(abi, (long)ARRAY_LEN(rights) - 1)];
	r.scoped = abi >= 6 ? 3 : 0;    /* abstract sockets and signals of others */
	rules = (int)syscall(LL_CREATE_RULESET, &r, abi >= 6 ? sizeof(r) : abi >= 4 ? 16 : 8, 0);
	if (rules < 0)
		return;
	ll_allow_resolver(rules);
	syscall(LL_RESTRICT_SELF, rules, 0);
}

static struct stat resolver;    /* as it was when the files were shut away */

bool nat_resolver_lost(void)
{
	struct stat now;
	auto_close int fd = -1;

	if (stat(RESOLV, &now) || (now.st_dev == resolver.st_dev && now.st_ino == resolver.st_ino))
		return false;
	fd = open(RESOLV, O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		resolver = now;
	return fd < 0 && errno == EACCES;
}

/* ---- system calls ------------------------------------------------------------------------------- */

/* glib and libc in a running libslirp; each group says for what. */
static const int allowed[] = {
	/* frames and the guest's sockets */
	SCMP_SYS(read), SCMP_SYS(write), SCMP_SYS(readv), SCMP_SYS(writev), SCMP_SYS(recvfrom),
	SCMP_SYS(recvmsg), SCMP_SYS(recvmmsg), SCMP_SYS(sendto), SCMP_SYS(sendmsg),
	SCMP_SYS(sendmmsg), SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(bind), SCMP_SYS(connect),
	SCMP_SYS(listen), SCMP_SYS(accept), SCMP_SYS(accept4), SCMP_SYS(shutdown), SCMP_SYS(close),
	SCMP_SYS(getsockname), SCMP_SYS(getpeername), SCMP_SYS(getsockopt), SCMP_SYS(setsockopt),
	/* resolv.conf */
	SCMP_SYS(lseek), SCMP_SYS(fstat), SCMP_SYS(stat), SCMP_SYS(lstat), SCMP_SYS(newfstatat),
	SCMP_SYS(statx),
	/* memory, time, the end */
	SCMP_SYS(brk), SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise), SCMP_SYS(futex),
	SCMP_SYS(clock_gettime), SCMP_SYS(gettimeofday), SCMP_SYS(time), SCMP_SYS(getrandom),
	SCMP_SYS(getpid), SCMP_SYS(gettid), SCMP_SYS(rt_sigreturn), SCMP_SYS(rt_sigprocmask),
	SCMP_SYS(rt_sigaction), SCMP_SYS(restart_syscall), SCMP_SYS(rseq), SCMP_SYS(sched_yield),
	SCMP_SYS(exit), SCMP_SYS(exit_group),
};

static int allow_with_arguments(scmp_filter_ctx ctx)
{
	const uint32_t ok = SCMP_ACT_ALLOW;
	int e = 0;

	for (int inet6 = 0; inet6 < 2; inet6++)
		e |= seccomp_rule_add(ctx, ok, SCMP_SYS(socket), 1,
			SCMP_A0(SCMP_CMP_EQ, inet6 ? AF_INET6 : AF_INET));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(openat), 1,
		SCMP_A2(SCMP_CMP_MASKED_EQ, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(open), 1,
		SCMP_A1(SCMP_CMP_MASKED_EQ, O_ACCMODE | O_CREAT | O_TRUNC, O_RDONLY));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(mmap), 1,
		SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(mprotect), 1,
		SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(ioctl), 1, SCMP_A1(SCMP_CMP_EQ, FIONREAD));
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(ioctl), 1, SCMP_A1(SCMP_CMP_EQ, FIONBIO));
	for (int cmd = F_GETFD; cmd <= F_SETFL; cmd++)
		e |= seccomp_rule_add(ctx, ok, SCMP_SYS(fcntl), 1,
			SCMP_A1(SCMP_CMP_EQ, (unsigned)cmd));
	/* abort() says so; nothing else may be signalled */
	e |= seccomp_rule_add(ctx, ok, SCMP_SYS(tgkill), 1,
		SCMP_A0(SCMP_CMP_EQ, (unsigned)getpid()));
	return e ? -EINVAL : 0;
}

#if !NAT_FILTER_CALLS
/* Asked by the address sanitizer: what may not read its own /proc cannot look for leaks. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
	return "detect_leaks=0";
}
#endif

static int filter_calls(void)
{
	scmp_filter_ctx ctx = seccomp_init(SCMP_ACT_KILL_PROCESS);
	int e;

	if (!ctx)
		return -ENOMEM;
	e = allow_with_arguments(ctx);
	for (unsigned i = 0; !e && i < ARRAY_LEN(allowed); i++)
		e = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, allowed[i], 0);
	if (!e)
		e = seccomp_load(ctx);
	seccomp_release(ctx);
	return e;
}

int nat_confine(const char **what)
{
	int e;

	*what = "no_new_privs";
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -errno;
	drop_identity();
	if (stat(RESOLV, &resolver))
		memset(&resolver, 0, sizeof(resolver));
	deny_files();
	*what = "system call filter";
	e = NAT_FILTER_CALLS ? filter_calls() : 0;      /* sanitizers need calls of their own */
	malloc_trim(0);
	return e;
}

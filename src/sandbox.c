/*
 * How this works
 *
 * Identity, capabilities and Landlock belong to a thread, not to a process, and the system calls that change
 * them act on the caller alone. (libc's setresuid() tells all threads by signal; the calls are made directly
 * here, for that costs more than the rest together.) So every thread confines itself as soon as it has opened
 * what it needs, those of vCPUs and loops while main is still building, and main last. Threads made later
 * inherit it. The system-call filter comes at the end, over all threads at once.
 *
 * Landlock is there to deny by path what the filter denies by call: a mistake in one is not yet a way out.
 * It takes no part in signals (ABI 6), because each thread has a domain of its own and must reach the others;
 * the filter lets them signal nobody else.
 */
#include "vmm/sandbox.h"
#include <errno.h>
#include <linux/capability.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "filter.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/vm.h"

#define NOBODY          65534

/* const while other threads start */
static enum sandbox_mode mode;
static bool was_root;
static int rules = -1;          /* Landlock rule set; -1: this kernel has none */

/* any thread */
static _Atomic int failed;      /* errno of the first thread that could not confine itself */

/* ---- files and networks: Landlock, by number: Debian 12's headers know ABI 2 ---------------------- */

struct landlock_rights {
	uint64_t files, tcp, scopes;    /* ABI 1, 4, 6 */
};
#define LANDLOCK_VERSION        1u      /* flag: tell the ABI */
#define LANDLOCK_TCP            3u      /* bind and connect */
#define LANDLOCK_ABSTRACT_UNIX  1u      /* scope: abstract sockets of others */

/* A rule set without rules: everything it handles is denied. */
static int deny_paths(void)
{
	/* Rights known since each ABI; the kernel refuses bits newer than itself. */
	static const uint64_t files[] = { 0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff };
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_VERSION);
	struct landlock_rights r = { 0 };

	if (abi < 1)
		return -1;
	r.files = files[MIN(abi, (long)ARRAY_LEN(files) - 1)];
	if (abi >= 4)
		r.tcp = LANDLOCK_TCP;
	if (abi >= 6)
		r.scopes = LANDLOCK_ABSTRACT_UNIX;
	return (int)syscall(SYS_landlock_create_ruleset, &r,
		abi >= 6 ? sizeof(r) : abi >= 4 ? offsetof(struct landlock_rights, scopes) :
						  sizeof(r.files), 0);
}

/* ---- one thread ----------------------------------------------------------------------------------- */

/* CI containers run as root: what runs the guest does not. */
static int drop_identity(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { { 0 }, { 0 } };

	/* EPERM, EINVAL: no right to, or no such ids in this user namespace. Then root is not root. */
	if (was_root && (syscall(SYS_setgroups, 0, NULL) ||
				syscall(SYS_setresgid, NOBODY, NOBODY, NOBODY) ||
				syscall(SYS_setresuid, NOBODY, NOBODY, NOBODY)) &&
		errno != EPERM && errno != EINVAL)
		return -errno;
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	return syscall(SYS_capset, &head, none) ? -errno : 0;
}

static int confine(void)
{
	int r = drop_identity();

	if (r)
		return r;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
		(rules >= 0 && syscall(SYS_landlock_restrict_self, rules, 0)))
		return -errno;
	return 0;
}

void sandbox_thread(void)
{
	int none = 0, r = mode == SANDBOX_OFF ? 0 : confine();

	if (r)
		atomic_compare_exchange_strong(&failed, &none, -r);
}

/* ---- the process; main thread --------------------------------------------------------------------- */

int sandbox_prepare(enum sandbox_mode m, struct error *err)
{
	const struct rlimit no_core = { 0, 0 };

	mode = m;
	if (m == SANDBOX_OFF)
		return 0;
	was_root = geteuid() == 0;
	if (setrlimit(RLIMIT_CORE, &no_core))
		return error_errno(err, errno, "sandbox: cannot do without core dumps");
	rules = deny_paths();
	if (rules < 0)
		log_info("no Landlock here (%s): the system-call filter alone keeps the guest from files",
			strerrordesc_np(errno));
	return 0;
}

/* Another identity cancels the signal that --die-with-parent asked for, and the parent may die meanwhile. */
static int confine_main(struct error *err)
{
	pid_t parent = getppid();
	int sig = 0, r = -atomic_load(&failed);

	prctl(PR_GET_PDEATHSIG, &sig);
	if (!r)
		r = confine();
	if (!r && was_root)
		prctl(PR_SET_DUMPABLE, 0);      /* others who are nobody have no business here */
	if (!r && sig && prctl(PR_SET_PDEATHSIG, sig))
		r = -errno;
	if (r)
		return error_errno(err, -r, "sandbox: cannot give up privileges (--sandbox off runs without)");
	if (sig && getppid() != parent)
		return error_set(err, ESRCH, "--die-with-parent: the parent is gone already");
	return 0;
}

int sandbox_enter(struct vm *vm, struct error *err)
{
	int r;

	if (mode == SANDBOX_OFF)
		return 0;
	loop_engine_name(vm->io);       /* wait until they are up: their set-up makes calls that end here */
	for (unsigned n = 0; n < VM_IOTHREADS; n++)
		if (vm->iothread[n])
			loop_engine_name(vm->iothread[n]);
	r = confine_main(err);
	if (rules >= 0)
		close(TAKE_FD(rules));
	if (r)
		return r;
	r = filter_load(FILTER_VM, mode == SANDBOX_LOG);
	if (r)
		return error_errno(err, -r, "sandbox: cannot load the system-call filter "
			"(--sandbox off runs without)");
	return 0;
}

int sandbox_tool(enum sandbox_mode m, struct error *err)
{
	int r = sandbox_prepare(m, err);

	if (r || m == SANDBOX_OFF)
		return r;
	r = confine_main(err);
	if (rules >= 0)
		close(TAKE_FD(rules));
	if (r)
		return r;
	r = filter_load(FILTER_TOOL, m == SANDBOX_LOG);
	return r ? error_errno(err, -r, "sandbox: cannot load the system-call filter (--sandbox off runs without)") : 0;
}

/* vmm doctor: what this host can do, measured or asked, and how to mend what it cannot. */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/landlock.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "cli.h"
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/kvm.h"
#include "vmm/log.h"
#include "vmm/spawner.h"

/* A stock kernel needs some 10^9 instructions to reach its init: below this rate that takes minutes. */
#define LINUX_RATE 1e8

struct report {
	bool json;
	struct facts *facts, *checks;
	bool usable;            /* /dev/kvm works */
	bool linux_runs;
};

/* One line: "  ok  name: words", and the same in the JSON object. */
__attribute__((format(printf, 4, 5)))
static struct facts *say(struct report *r, const char *name, bool ok, const char *fmt, ...)
{
	struct facts *f = facts_object(r->checks, name);
	char words[600];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(words, sizeof(words), fmt, ap);
	va_end(ap);
	facts_bool(f, "ok", ok);
	facts_str(f, "words", words);
	if (!r->json)
		printf("  %s  %-10s %s\n", ok ? "ok" : "--", name, words);
	return f;
}

static void per_second(double rate, char *buf, size_t len)
{
	if (rate >= 1e9)
		snprintf(buf, len, "%.1f G", rate / 1e9);
	else
		snprintf(buf, len, "%.1f M", rate / 1e6);
}

static void check_guests(struct report *r, const struct arch_probe *p)
{
	bool fast = p->ring0_per_second >= LINUX_RATE;

	r->linux_runs = fast && p->ring0_complete;
	say(r, "test-kernels", p->ring0_per_second > 0, "%s",
		p->ring0_per_second > 0 ? "bare-metal kernels (Multiboot, PVH, flat) run" : "the probe guest did not run");
	say(r, "linux", r->linux_runs, "%s",
		r->linux_runs ? "stock Linux kernels run" :
		fast ? "stock Linux kernels do not run: ring 0 lacks instructions they need" :
		"stock Linux kernels do not run: ring 0 is interpreted, too slow and incomplete; run them on "
		"hardware virtualization, or in an emulated machine (make demo does)");
}

static void check_kvm(struct report *r)
{
	struct error err = { 0 };
	struct arch_probe p;
	char ring0[32], ring3[32];
	int fd = kvm_open(&err);
	struct facts *f;

	if (fd < 0 || kvm_check(fd, &err) || arch_probe(fd, &p, &err)) {
		say(r, "kvm", false, "%s", err.msg);
		say(r, "linux", false, "no guest runs without /dev/kvm");
		if (fd >= 0)
			close(fd);
		return;
	}
	close(fd);
	r->usable = true;
	per_second(p.ring0_per_second, ring0, sizeof(ring0));
	per_second(p.ring3_per_second, ring3, sizeof(ring3));
	f = say(r, "kvm", true, "%s: ring 0 at %s, ring 3 at %s instructions a second (measured)",
		p.ring0_per_second < LINUX_RATE ? "software KVM, ring 0 is interpreted" :
		p.ring0_complete ? "hardware virtualization" : "an incomplete KVM", ring0, ring3);
	facts_f64(f, "ring0_per_second", p.ring0_per_second);
	facts_f64(f, "ring3_per_second", p.ring3_per_second);
	facts_bool(f, "ring0_complete", p.ring0_complete);
	facts_bool(f, "software", kvm_is_software());
	check_guests(r, &p);
}

static void check_io_uring(struct report *r)
{
	struct io_uring ring;
	int ret = io_uring_queue_init(8, &ring, 0);

	if (!ret)
		io_uring_queue_exit(&ring);
	say(r, "io_uring", !ret, ret == 0 ? "available" :
		"refused (%s): vmm uses epoll and threads, slower on disks; kernel.io_uring_disabled and the "
		"container's seccomp profile decide", strerrordesc_np(-ret));
}

static long meminfo(const char *key)
{
	char line[200];
	long val = -1;
	FILE *f = fopen("/proc/meminfo", "re");

	while (f && val < 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, strlen(key)))
			val = strtol(line + strlen(key), NULL, 10);
	if (f)
		fclose(f);
	return val;
}

static void check_memory(struct report *r)
{
	char thp[100] = "unknown";
	FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "re");
	long free_pages = meminfo("HugePages_Free:");

	if (f && fgets(thp, sizeof(thp), f))
		thp[strcspn(thp, "\n")] = '\0';
	if (f)
		fclose(f);
	say(r, "hugepages", free_pages > 0, "%ld of 2 MiB free for --hugepages%s; transparent for guests: %s",
		free_pages < 0 ? 0 : free_pages,
		free_pages > 0 ? "" : " (sysctl vm.nr_hugepages=N makes some)", thp);
}

static void check_sandbox(struct report *r)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);

	if (abi > 0)
		say(r, "landlock", true, "ABI %ld", abi);
	else
		say(r, "landlock", false, "not available (%s): vmm and its NAT helper are confined by their system-call filters alone",
			strerrordesc_np(errno));
}

static void check_network(struct report *r)
{
	char path[4096];
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	if (!helper_path("vmm-nat", path, sizeof(path)))
		say(r, "nat", true, "%s", path);
	else
		say(r, "nat", false, "the helper vmm-nat is neither beside vmm nor in its libexec/vmm: --net user cannot work");
	if (fd >= 0)
		say(r, "tap", true, "/dev/net/tun opens");
	else
		say(r, "tap", false, "/dev/net/tun: %s (not needed for --net user)", strerrordesc_np(errno));
	if (fd >= 0)
		close(fd);
}

int cmd_doctor(int argc, char **argv)
{
	struct report r = { .facts = NULL };

	for (int i = 0; i < argc; i++) {
		if (!strcmp(argv[i], "--json")) {
			r.json = true;
		} else if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
			printf("usage: vmm doctor [--json]\nStatus: 0 guests can run here, 125 they cannot.\n");
			return 0;
		} else {
			log_error("doctor: unknown argument '%s': only --json is accepted", argv[i]);
			return 125;
		}
	}
	r.facts = facts_new();
	r.checks = facts_object(r.facts, "checks");
	if (!r.json)
		printf("vmm %s on this host:\n", VMM_VERSION);
	check_kvm(&r);
	check_io_uring(&r);
	check_memory(&r);
	check_sandbox(&r);
	check_network(&r);
	facts_str(r.facts, "vmm", VMM_VERSION);
	facts_bool(r.facts, "usable", r.usable);
	facts_bool(r.facts, "linux", r.linux_runs);
	if (r.json) {
		auto_free char *text = facts_text(r.facts);

		printf("%s\n", text ? text : "{}");
	}
	facts_free(r.facts);
	return r.usable ? 0 : 125;
}

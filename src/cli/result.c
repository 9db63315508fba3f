#include "result.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/loop.h"
#include "vmm/vcpu.h"

int result_open(struct result *r, const char *path, struct error *err)
{
	r->fd = r->self = -1;
	r->path = path;
	if (!path)
		return 0;
	r->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (r->fd < 0)
		return error_errno(err, errno, "--result: %s", path);
	r->self = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	return 0;
}

/* Peak memory of this program: getrusage() would count what the forked shell had before the exec. */
static uint64_t peak_rss_kib(const struct result *r)
{
	static const char key[] = "\nVmHWM:";
	char text[4096];
	ssize_t n = r->self < 0 ? -1 : pread(r->self, text, sizeof(text) - 1, 0);
	const char *at;

	if (n < 0)
		return 0;
	text[n] = '\0';
	at = strstr(text, key);
	return at ? strtoull(at + sizeof(key) - 1, NULL, 10) : 0;
}

static double seconds(struct timeval tv)
{
	return (double)tv.tv_sec + (double)tv.tv_usec / 1e6;
}

static void describe_run(const struct result *r, struct vm *vm, struct facts *f)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	facts_f64(f, "wall_seconds", (double)(loop_now() - r->start_ns) / 1e9);
	facts_f64(f, "cpu_seconds", seconds(u.ru_utime) + seconds(u.ru_stime));
	facts_u64(f, "peak_rss_kib", peak_rss_kib(r));
	if (vm && vm->nr_vcpus && vm->vcpu[0]->first_run_ns)
		facts_f64(f, "first_instruction_seconds",
			(double)(vm->vcpu[0]->first_run_ns - r->start_ns) / 1e9);
}

static int write_all(int fd, const char *text, size_t len)
{
	while (len) {
		ssize_t n = write(fd, text, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		text += n;
		len -= (size_t)n;
	}
	return 0;
}

int result_write(struct result *r, struct vm *vm, const struct vm_stop *stop, struct error *err)
{
	auto_free char *text = NULL;
	struct facts *f;
	int ret;

	if (r->fd < 0)
		return 0;
	f = facts_new();
	facts_str(f, "vmm", VMM_VERSION);
	facts_i64(f, "status", vm_stop_status(stop));
	facts_str(f, "cause", vm_stop_name(stop->cause));
	facts_str(f, "reason", stop->words);
	if (stop->has_guest_value)
		facts_u64(f, "guest_value", stop->guest_value);
	else
		facts_str(f, "guest_value", NULL);
	describe_run(r, vm, f);
	if (vm)
		vm_describe(vm, f);
	text = facts_text(f);
	facts_free(f);
	ret = text ? write_all(r->fd, text, strlen(text)) : -ENOMEM;
	if (!ret)
		ret = write_all(r->fd, "\n", 1);
	if (ret)
		error_errno(err, -ret, "--result: %s", r->path);
	close(r->fd);
	if (r->self >= 0)
		close(r->self);
	r->fd = r->self = -1;
	return ret;
}

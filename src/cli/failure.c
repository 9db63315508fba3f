#include "failure.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/spawner.h"
#include "vmm/vm.h"

#define HELPER     "vmm-disasm"
#define HELPER_MS  2000

int failure_prepare(struct spawner *s, struct error *err)
{
	char path[PATH_MAX];
	const char *const argv[] = { path, NULL };
	int r;

	if (helper_path(HELPER, path, sizeof(path)))
		return 0;
	r = spawner_add(s, argv, err);
	return r < 0 ? r : 0;
}

static void say(const char *text, size_t len)
{
	if (write(STDERR_FILENO, text, len) < 0)
		return;         /* nobody listens */
}

/* The disassembler gets the address and the bytes, and answers in lines within HELPER_MS. */
static void disassemble(const struct vm *vm)
{
	int n = vm->spawner ? spawner_find(vm->spawner, HELPER) : -ENOENT, in[2], out[2], pidfd;
	uint8_t msg[8 + sizeof(vm->autopsy_insn)];
	struct pollfd p = { .events = POLLIN };
	char text[1024];
	ssize_t len;

	if (n < 0 || pipe2(in, O_CLOEXEC))
		return;
	if (pipe2(out, O_CLOEXEC)) {
		close(in[0]);
		close(in[1]);
		return;
	}
	pidfd = spawner_run(vm->spawner, (unsigned)n, (const int[]){ in[0], out[1] }, 2);
	close(in[0]);
	close(out[1]);
	memcpy(msg, &vm->autopsy_rip, 8);
	memcpy(msg + 8, vm->autopsy_insn, vm->autopsy_insn_len);
	p.fd = out[0];
	if (pidfd >= 0 && write(in[1], msg, 8 + vm->autopsy_insn_len) > 0)
		while (poll(&p, 1, HELPER_MS) == 1 && (len = read(out[0], text, sizeof(text))) > 0)
			say(text, (size_t)len);
	close(in[1]);
	close(out[0]);
	if (pidfd >= 0)
		close(pidfd);
}

void failure_report(struct vm *vm)
{
	if (vm->autopsy)
		say(vm->autopsy, strlen(vm->autopsy));
	if (vm->autopsy_insn_len)
		disassemble(vm);
	if (vm->software_kvm)
		log_error("this host's KVM is software: it interprets ring 0 and lacks some instructions there "
			"(SSE, AVX, xsave, cmpxchg16b, int3); 'vmm doctor' says what can run");
}

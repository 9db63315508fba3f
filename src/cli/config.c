#include "config.h"
#include <errno.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/arch.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/log.h"
#include "vmm/opts.h"
#include "vmm/spawner.h"

#define MAX_CPUS 4096
#define MIN_MEM  (1ull << 20)
#define MAX_MEM  (1ull << 42)   /* 4 TiB: a KVM may spend 2 GiB of host memory on each TiB */

struct option {
	const char *name, *alias;       /* alias: what hands used to QEMU type */
	char letter;
	const char *arg;                /* NULL: a flag */
	int (*set)(struct run_config *c, const char *val, struct error *err);
	const char *help;               /* NULL: not on the first screen (vmm.1 has all) */
};

static int bad(struct error *err, const char *option, const char *val, const char *accepted)
{
	return error_set(err, EINVAL, "--%s: '%s': expected %s", option, val, accepted);
}

static int add_device(struct run_config *c, const char *class, const char *option, const char *args,
	struct error *err)
{
	if (c->vm.nr_devices == MAX_DEVICES)
		return error_set(err, EINVAL, "%s: more than %d devices", option, MAX_DEVICES);
	c->devices[c->vm.nr_devices++] = (struct device_spec){ class, option, args };
	return 0;
}

static int add_file(const char **files, unsigned *nr, const char *option, const char *val,
	struct error *err)
{
	if (*nr == MAX_FILES)
		return error_set(err, EINVAL, "%s: given more than %d times", option, MAX_FILES);
	files[(*nr)++] = val;
	return 0;
}

static int set_kernel(struct run_config *c, const char *val, struct error *err)
{
	if (c->vm.boot.kernel)
		return error_set(err, EINVAL, "--kernel: given twice ('%s' and '%s')",
			c->vm.boot.kernel, val);
	c->vm.boot.kernel = val;
	return 0;
}

static int set_initrd(struct run_config *c, const char *val, struct error *err)
{
	return add_file(c->initrds, &c->vm.boot.nr_initrds, "--initrd", val, err);
}

static int set_module(struct run_config *c, const char *val, struct error *err)
{
	return add_file(c->modules, &c->vm.boot.nr_modules, "--module", val, err);
}

static int set_cmdline(struct run_config *c, const char *val, struct error *err)
{
	if (strlen(val) >= BOOT_CMDLINE_MAX)
		return error_set(err, EINVAL, "--cmdline: %zu bytes, at most %d are accepted",
			strlen(val), BOOT_CMDLINE_MAX - 1);
	for (const char *p = val; *p; p++)
		if (*p == '\n' || *p == '\r')
			return error_set(err, EINVAL, "--cmdline: holds a line break");
	c->vm.boot.cmdline = val;
	return 0;
}

static int set_kernel_entry(struct run_config *c, const char *val, struct error *err)
{
	char words[200] = "";

	for (unsigned i = 0; loader_entries[i]; i++) {
		if (!strcmp(val, loader_entries[i])) {
			c->vm.boot.entry = i;
			return 0;
		}
		snprintf(words + strlen(words), sizeof(words) - strlen(words), "%s%s",
			i ? ", " : "one of ", loader_entries[i]);
	}
	return bad(err, "kernel-entry", val, words);
}

static int set_load_address(struct run_config *c, const char *val, struct error *err)
{
	if (parse_u64(val, &c->vm.boot.load_address))
		return bad(err, "load-address", val, "an address such as 0x100000");
	c->vm.boot.has_load_address = true;
	return 0;
}

static int set_disk(struct run_config *c, const char *val, struct error *err)
{
	return add_device(c, "blk", "--disk", val, err);
}

static int set_net(struct run_config *c, const char *val, struct error *err)
{
	c->net_given = true;
	if (!strcmp(val, "none"))
		return 0;
	return add_device(c, "net", "--net", val, err);
}

static int set_console(struct run_config *c, const char *val, struct error *err)
{
	return add_device(c, "console", "--console", val, err);
}

static int set_rng(struct run_config *c, const char *val, struct error *err)
{
	(void)val;
	return add_device(c, "rng", "--rng", "", err);
}

static int set_balloon(struct run_config *c, const char *val, struct error *err)
{
	(void)val;
	return add_device(c, "balloon", "--balloon", "", err);
}

static int list_devices(void)
{
	for (unsigned i = 0; device_classes[i]; i++)
		printf("%-10s %s\n", device_classes[i]->name, device_classes[i]->help);
	return 0;
}

static int set_device(struct run_config *c, const char *val, struct error *err)
{
	size_t n = strcspn(val, ",");

	if (!strcmp(val, "help")) {
		list_devices();
		c->help = true;
		return 0;
	}
	for (unsigned i = 0; device_classes[i]; i++)
		if (strlen(device_classes[i]->name) == n && !strncmp(device_classes[i]->name, val, n))
			return add_device(c, device_classes[i]->name, "--device",
				val[n] ? val + n + 1 : "", err);
	return error_set(err, EINVAL, "--device: no class '%.*s': 'vmm --device help' lists them",
		(int)n, val);
}

static int set_mem(struct run_config *c, const char *val, struct error *err)
{
	uint64_t n;

	/* A bare number is MiB, as in QEMU and kvmtool. */
	if (!parse_u64(val, &n) && n < MIN_MEM)
		n <<= 20;
	else if (parse_size(val, &n))
		return bad(err, "mem", val, "a size such as 512M or 4G");
	if (n < MIN_MEM || n > MAX_MEM)
		return error_set(err, EINVAL, "--mem: '%s': must be 1M to 4T", val);
	if (n & 4095)
		return error_set(err, EINVAL, "--mem: '%s': must be a multiple of 4K", val);
	c->vm.mem = n;
	return 0;
}

static int set_cpus(struct run_config *c, const char *val, struct error *err)
{
	uint64_t n;

	if (parse_u64(val, &n) || n < 1 || n > MAX_CPUS)
		return bad(err, "cpus", val, "1 to 4096");
	c->vm.cpus = (unsigned)n;
	return 0;
}

static int set_cpu(struct run_config *c, const char *val, struct error *err)
{
	c->vm.cpu = val;
	return arch_cpu_parse(val, err);
}

static int set_machine(struct run_config *c, const char *val, struct error *err)
{
	if (!strcmp(val, "pc"))
		c->vm.machine = MACHINE_PC;
	else if (!strcmp(val, "microvm"))
		c->vm.machine = MACHINE_MICROVM;
	else
		return bad(err, "machine", val, "pc or microvm");
	return 0;
}

static int set_serial(struct run_config *c, const char *val, struct error *err)
{
	if (c->nr_serials == VM_SERIALS)
		return error_set(err, EINVAL, "--serial: given more than %d times (COM1 to COM4)",
			VM_SERIALS);
	c->serial_given = true;
	c->vm.serial[c->nr_serials++] = strcmp(val, "none") ? val : NULL;
	return 0;
}

static int set_debugcon(struct run_config *c, const char *val, struct error *err)
{
	(void)err;
	c->vm.debugcon = val;
	return 0;
}

static int set_debug_exit(struct run_config *c, const char *val, struct error *err)
{
	auto_free char *copy = strdup(val);
	char *mode = copy ? strchr(copy, ',') : NULL;
	uint64_t port;

	if (!strcmp(val, "off")) {
		c->vm.debug_exit = false;
		return 0;
	}
	if (mode)
		*mode++ = '\0';
	if (!copy || parse_u64(copy, &port) || port > 0xfffc)
		return bad(err, "debug-exit", val, "PORT[,raw|qemu], such as 0xf4 or 0xf4,qemu, or off");
	if (!mode || !strcmp(mode, "raw"))
		c->vm.debug_exit_mode = DEBUG_EXIT_RAW;
	else if (!strcmp(mode, "qemu"))
		c->vm.debug_exit_mode = DEBUG_EXIT_QEMU;
	else
		return bad(err, "debug-exit", val, "raw or qemu after the port");
	c->vm.debug_exit = true;
	c->vm.debug_exit_port = (uint16_t)port;
	return 0;
}

static int set_testdev(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	c->vm.testdev = true;
	return 0;
}

static int set_on_reboot(struct run_config *c, const char *val, struct error *err)
{
	if (strcmp(val, "exit") && strcmp(val, "restart"))
		return bad(err, "on-reboot", val, "exit or restart");
	c->vm.restart_on_reboot = !strcmp(val, "restart");
	return 0;
}

static int set_on_panic(struct run_config *c, const char *val, struct error *err)
{
	if (strcmp(val, "exit") && strcmp(val, "ignore"))
		return bad(err, "on-panic", val, "exit or ignore");
	c->vm.ignore_panic = !strcmp(val, "ignore");
	return 0;
}

static int set_timeout(struct run_config *c, const char *val, struct error *err)
{
	if (parse_seconds(val, &c->vm.timeout_ns) || !c->vm.timeout_ns)
		return bad(err, "timeout", val, "a time above 0, such as 30, 500ms, 5m or 1h");
	return 0;
}

static int set_grace(struct run_config *c, const char *val, struct error *err)
{
	if (parse_seconds(val, &c->vm.grace_ns))
		return bad(err, "grace", val, "a time such as 10, 500ms or 1m");
	return 0;
}

static int set_result(struct run_config *c, const char *val, struct error *err)
{
	(void)err;
	c->vm.result_path = val;
	return 0;
}

static int set_hugepages(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	c->vm.hugepages = true;
	return 0;
}

static int set_engine(struct run_config *c, const char *val, struct error *err)
{
	if (!strcmp(val, "auto"))
		c->vm.engine = LOOP_AUTO;
	else if (!strcmp(val, "io_uring"))
		c->vm.engine = LOOP_URING;
	else if (!strcmp(val, "epoll"))
		c->vm.engine = LOOP_EPOLL;
	else
		return bad(err, "engine", val, "auto, io_uring or epoll");
	return 0;
}

static int set_poll(struct run_config *c, const char *val, struct error *err)
{
	uint64_t n;

	if (parse_u64(val, &n) || n > 1000000)
		return bad(err, "poll-us", val, "0 to 1000000 microseconds");
	c->vm.poll_us = (unsigned)n;
	return 0;
}

static int set_sandbox(struct run_config *c, const char *val, struct error *err)
{
	if (!strcmp(val, "on"))
		c->vm.sandbox = SANDBOX_ON;
	else if (!strcmp(val, "off"))
		c->vm.sandbox = SANDBOX_OFF;
	else if (!strcmp(val, "log"))
		c->vm.sandbox = SANDBOX_LOG;
	else
		return bad(err, "sandbox", val, "on, off or log");
	return 0;
}

static int set_die_with_parent(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	c->vm.die_with_parent = true;
	return 0;
}

static int set_verbose(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	c->verbose++;
	return 0;
}

static int set_quiet(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	c->verbose = -1;
	return 0;
}

static int set_help(struct run_config *c, const char *val, struct error *err)
{
	(void)val, (void)err;
	config_usage();
	c->help = true;
	return 0;
}

static const struct option options[] = {
	{ "kernel", NULL, 'k', "FILE", set_kernel, "bzImage, vmlinux, PVH or Multiboot ELF, flat binary" },
	{ "initrd", NULL, 'i', "FILE", set_initrd, "initial RAM disk; several are joined" },
	{ "module", NULL, 0, "FILE[,ARGS]", set_module, "Multiboot module; repeatable" },
	{ "cmdline", "append", 'a', "TEXT", set_cmdline, "kernel command line" },
	{ "disk", NULL, 'd', "FILE[,ro][,KEY=VAL]", set_disk, "disk image: raw, or format=NAME; repeatable" },
	{ "net", NULL, 'n', "user[,KEY=VAL]|none", set_net, "NAT (default); fwd=tcp:HOSTPORT:GUESTPORT, host=allow" },
	{ "mem", NULL, 'm', "SIZE", set_mem, "guest memory (default 512M)" },
	{ "cpus", "smp", 'c', "N", set_cpus, "virtual CPUs (default 1)" },
	{ "cpu", NULL, 0, "host[,-F][,+F]", set_cpu, "CPU features: mask with -, add with +" },
	{ "machine", NULL, 'M', "pc|microvm", set_machine, "PCI and ACPI PC (default), or virtio-mmio only" },
	{ "serial", NULL, 's', "SPEC", set_serial, "COM1, then COM2…: stdio (default), none, file:F, unix:F, pipe:F" },
	{ "console", NULL, 0, "SPEC[,name=N]", set_console, "virtio console port; the first is hvc0" },
	{ "rng", NULL, 0, NULL, set_rng, "virtio random numbers" },
	{ "balloon", NULL, 0, NULL, set_balloon, "virtio balloon with free page reporting" },
	{ "device", NULL, 0, "CLASS[,KEY=VAL]|help", set_device, "any device, or the list of them" },
	{ "debug-exit", NULL, 0, "PORT[,qemu]|off", set_debug_exit, "port that ends the run (default 0xf4, raw)" },
	{ "debugcon", NULL, 0, "SPEC", set_debugcon, "where port 0xe9 writes to" },
	{ "testdev", NULL, 0, NULL, set_testdev, "pc-testdev and pci-testdev for kvm-unit-tests" },
	{ "timeout", NULL, 't', "TIME", set_timeout, "end the run with status 124 after 30, 500ms, 5m, 1h" },
	{ "on-reboot", NULL, 0, "exit|restart", set_on_reboot, "guest reset: end with 100 (default), or start again" },
	{ "on-panic", NULL, 0, "exit|ignore", set_on_panic, "guest panic: end with 101 (default), or go on" },
	{ "result", NULL, 'r', "FILE", set_result, "write what happened as JSON" },
	{ "kernel-entry", NULL, 0, "HOW", set_kernel_entry, "how to enter the kernel (default auto)" },
	{ "load-address", NULL, 0, "ADDR", set_load_address, "where a flat binary goes" },
	{ "hugepages", NULL, 0, NULL, set_hugepages, "guest memory from the host's huge-page pool" },
	{ "die-with-parent", NULL, 0, NULL, set_die_with_parent, "end when the starting process ends" },
	{ "grace", NULL, 0, "TIME", set_grace, NULL },
	{ "engine", NULL, 0, "auto|io_uring|epoll", set_engine, NULL },
	{ "poll-us", NULL, 0, "N", set_poll, NULL },
	{ "sandbox", NULL, 0, "on|off|log", set_sandbox, NULL },
	{ "quiet", NULL, 'q', NULL, set_quiet, NULL },
	{ "verbose", NULL, 'v', NULL, set_verbose, "say what is done; twice for more" },
	{ "help", NULL, 'h', NULL, set_help, NULL },
};

void config_usage(void)
{
	printf("usage: vmm [run] --kernel FILE [OPTION]…\n"
	       "       vmm disk COMMAND ...    disk images: make, check, convert (vmm disk --help)\n"
	       "       vmm doctor [--json]     what this host can run\n"
	       "       vmm --version | --help\n\n");
	for (unsigned i = 0; i < ARRAY_LEN(options); i++) {
		const struct option *o = &options[i];
		char left[64];

		if (!o->help)
			continue;
		snprintf(left, sizeof(left), "%c%c%s--%s%s%s", o->letter ? '-' : ' ',
			o->letter ? o->letter : ' ', o->letter ? ", " : "  ", o->name,
			o->arg ? " " : "", o->arg ? o->arg : "");
		printf("  %-34s %s\n", left, o->help);
	}
	printf("\nThe status tells what happened: 0 powered off, 100 reset, 101 panic, 102 triple fault,\n"
	       "103 halted, 105 KVM failure, 124 timeout, 125 vmm's own error, else the guest's value.\n"
	       "man vmm has everything; Ctrl-A x ends a run in a terminal.\n");
}

static int unknown_option(const char *arg, const char *name, struct error *err)
{
	const char *best = NULL;
	unsigned least = MIN(4, (unsigned)strlen(name));        /* a name with no letter right is no slip */

	for (unsigned i = 0; i < ARRAY_LEN(options); i++) {
		const char *const names[] = { options[i].name, options[i].alias };

		for (unsigned k = 0; k < ARRAY_LEN(names) && names[k]; k++) {
			unsigned d = word_distance(name, names[k]);

			if (d < least) {
				least = d;
				best = names[k];
			}
		}
	}
	if (best)
		return error_set(err, EINVAL, "unknown option '%s': did you mean --%s?", arg, best);
	return error_set(err, EINVAL, "unknown option '%s': see vmm --help", arg);
}

static const struct option *find_long(const char *name)
{
	for (unsigned i = 0; i < ARRAY_LEN(options); i++)
		if (!strcmp(name, options[i].name) || (options[i].alias && !strcmp(name, options[i].alias)))
			return &options[i];
	return NULL;
}

/* -k FILE, -kFILE; but -kernel and -smp are slips of the hand, not values of -k and -s. */
static const struct option *find_short(const char *arg)
{
	for (unsigned i = 0; i < ARRAY_LEN(options); i++)
		if (options[i].letter && options[i].letter == arg[1])
			return arg[2] && (!options[i].arg || find_long(arg + 1)) ? NULL : &options[i];
	return NULL;
}

/* One argument and, where it takes one, its value. Returns how many of argv were used, or -errno. */
static int parse_one(struct run_config *c, int argc, char **argv, struct error *err)
{
	const char *arg = argv[0], *val = NULL;
	const struct option *o = NULL;
	char name[64];
	int used = 1, r;

	if (arg[0] != '-' || !arg[1])
		return error_set(err, EINVAL, "unexpected argument '%s': options start with --, and the "
			"kernel is given with --kernel", arg);
	if (arg[1] != '-') {
		o = find_short(arg);
		val = o && arg[2] ? arg + 2 : NULL;
		snprintf(name, sizeof(name), "%s", arg + 1);
	} else {
		const char *eq = strchr(arg, '=');

		snprintf(name, sizeof(name), "%.*s", eq ? (int)(eq - arg - 2) : 60, arg + 2);
		o = find_long(name);
		val = eq ? eq + 1 : NULL;
	}
	if (!o)
		return unknown_option(arg, name, err);
	if (!o->arg && val)
		return error_set(err, EINVAL, "--%s takes no value ('%s' given)", o->name, val);
	if (o->arg && !val) {
		if (argc < 2)
			return error_set(err, EINVAL, "--%s needs a value: %s", o->name, o->arg);
		val = argv[1];
		used = 2;
	}
	r = o->set(c, val, err);
	return r ? r : used;
}

/* What the smaller machine does not have is refused, not left out in silence. */
static int check_machine(const struct run_config *c, struct error *err)
{
	const char *what = NULL;

	if (c->vm.machine == MACHINE_PC)
		return 0;
	if (c->nr_serials > 1)
		what = "a second --serial";
	else if (c->vm.debugcon)
		what = "--debugcon";
	else if (c->vm.testdev)
		what = "--testdev";
	return what ? error_set(err, EINVAL, "%s: --machine microvm has none of it, --machine pc has", what) : 0;
}

int config_parse(struct run_config *c, int argc, char **argv, struct error *err)
{
	*c = (struct run_config){
		.vm = {
			.machine = MACHINE_PC,
			.mem = 512ull << 20,
			.cpus = 1,
			.cpu = "host",
			.debug_exit = true,
			.debug_exit_port = 0xf4,
			.grace_ns = 10000000000ull,
			.engine = LOOP_AUTO,
			.poll_us = 50,
			.sandbox = SANDBOX_ON,
			.boot.cmdline = "",
		},
	};
	c->vm.devices = c->devices;
	c->vm.boot.initrds = c->initrds;
	c->vm.boot.modules = c->modules;
	while (argc > 0) {
		int used = parse_one(c, argc, argv, err);

		if (used < 0)
			return used;
		if (c->help)
			return 0;
		argc -= used;
		argv += used;
	}
	if (!c->vm.boot.kernel)
		return error_set(err, EINVAL, "no kernel given: vmm --kernel FILE (vmm --help lists the options)");
	if (check_machine(c, err))
		return -EINVAL;
	if (!c->serial_given)
		c->vm.serial[0] = "stdio";
	return 0;
}

void config_default_net(struct run_config *c)
{
	char path[PATH_MAX];
	struct error none;

	if (c->net_given)
		return;
	if (helper_path("vmm-nat", path, sizeof(path)))
		log_warn("no network: vmm-nat is neither beside vmm nor in its libexec/vmm (--net none to not be told)");
	else
		add_device(c, "net", "--net", "user", &none);
}

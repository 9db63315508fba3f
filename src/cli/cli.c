#include "cli.h"
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>
#include <fcntl.h>
#include "config.h"
#include "vmm/cleanup.h"
#include "vmm/log.h"

static int stray(const char *arg)
{
	log_error("unexpected argument '%s': nothing may follow", arg);
	return 125;
}

static int cmd_version(int argc, char **argv)
{
	if (argc)
		return stray(argv[0]);
	printf("vmm %s\n", VMM_VERSION);
	return 0;
}

static int cmd_help(int argc, char **argv)
{
	if (argc)
		return stray(argv[0]);
	config_usage();
	return 0;
}

static const struct {
	const char *name;
	int (*fn)(int argc, char **argv);       /* argv past the name */
} commands[] = {
	{ "run", cmd_run },
	{ "disk", cmd_disk },
	{ "doctor", cmd_doctor },
	{ "help", cmd_help },
	{ "version", cmd_version },
	{ "--version", cmd_version },
	{ "-V", cmd_version },
};

/* A closed standard descriptor would be taken by the next file opened: put /dev/null there. */
static void fill_standard_fds(void)
{
	for (int fd = 0; fd < 3; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_WRONLY : O_RDONLY) != fd)
			return;
}

int cli_main(int argc, char **argv)
{
	/* One arena: less memory, and no look at /sys for the number of CPUs once files are out of reach. */
	mallopt(M_ARENA_MAX, 1);
	fill_standard_fds();
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);       /* a file-size limit is an I/O error of the disk */
	if (getauxval(AT_SECURE)) {
		log_error("refused: this program is set-user-ID, set-group-ID or has file capabilities, and is not "
			"made for that; give the user access to /dev/kvm instead");
		return 125;
	}
	if (argc < 2) {
		config_usage();
		return 125;
	}
	for (unsigned i = 0; i < ARRAY_LEN(commands); i++)
		if (!strcmp(argv[1], commands[i].name))
			return commands[i].fn(argc - 2, argv + 2);
	if (argv[1][0] != '-') {
		log_error("unknown command '%s': expected run, disk, doctor, help or version, or options (vmm --help)",
			argv[1]);
		return 125;
	}
	return cmd_run(argc - 1, argv + 1);
}

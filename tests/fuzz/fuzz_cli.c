/*
 * The command line: NUL-separated arguments through config_parse(). Whatever they are, it ends with a
 * configuration within bounds, or with one line of words.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli/config.h"
#include "vmm/error.h"
#include "vmm/opts.h"

#define MAX_ARGS 200

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(cond)                                                                              \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "does not hold: %s\n", #cond);                             \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

static void check_words(const struct error *err)
{
	size_t n = strnlen(err->msg, sizeof(err->msg));

	REQUIRE(err->code > 0 && n > 0 && n < sizeof(err->msg));
}

/* --disk, --net, --device …: what their classes would be given. */
static void check_device(const struct device_spec *d)
{
	const char *implied = NULL;
	struct error err = { 0 };
	struct opts *o;

	REQUIRE(d->class && d->option && d->args);
	for (unsigned i = 0; device_classes[i]; i++)
		if (!strcmp(device_classes[i]->name, d->class))
			implied = device_classes[i]->implied;
	if (opts_parse(&o, d->option, d->args, implied, &err))
		check_words(&err);
	else
		opts_free(o);
}

static void check_config(const struct run_config *c)
{
	const struct vm_config *v = &c->vm;

	if (c->help)
		return;
	REQUIRE(v->boot.kernel && v->boot.cmdline && strlen(v->boot.cmdline) < BOOT_CMDLINE_MAX);
	REQUIRE(v->mem >= 1 << 20 && v->mem <= 1ull << 46 && v->mem % 4096 == 0);
	REQUIRE(v->cpus >= 1 && v->cpus <= 4096);
	REQUIRE(v->nr_devices <= MAX_DEVICES && c->nr_serials <= VM_SERIALS);
	REQUIRE(v->boot.nr_initrds <= MAX_FILES && v->boot.nr_modules <= MAX_FILES);
	REQUIRE(v->debug_exit_port <= 0xfffc && v->poll_us <= 1000000);
	for (unsigned i = 0; i < v->nr_devices; i++)
		check_device(&v->devices[i]);
	for (unsigned i = 0; i < v->boot.nr_initrds; i++)
		REQUIRE(v->boot.initrds[i]);
	for (unsigned i = 0; i < v->boot.nr_modules; i++)
		REQUIRE(v->boot.modules[i]);
}

/* --help and --device help print. */
static int parse_in_silence(struct run_config *c, int argc, char **argv, struct error *err)
{
	static int null = -1, out = -1;
	int r;

	if (null < 0) {
		null = open("/dev/null", O_WRONLY | O_CLOEXEC);
		out = dup(STDOUT_FILENO);
	}
	fflush(stdout);
	REQUIRE(dup2(null, STDOUT_FILENO) >= 0);
	r = config_parse(c, argc, argv, err);
	fflush(stdout);
	REQUIRE(dup2(out, STDOUT_FILENO) >= 0);
	return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct run_config c;
	struct error err = { 0 };
	char *text = malloc(size + 1), *argv[MAX_ARGS + 1];
	int argc = 0;

	if (!text)
		abort();
	memcpy(text, data, size);
	text[size] = '\0';
	for (char *s = text; s < text + size && argc < MAX_ARGS; s += strlen(s) + 1)
		argv[argc++] = s;
	argv[argc] = NULL;
	if (parse_in_silence(&c, argc, argv, &err) == 0)
		check_config(&c);
	else
		check_words(&err);
	free(text);
	return 0;
}

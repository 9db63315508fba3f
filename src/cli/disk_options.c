/* vmm disk: argv by the tables of disk.c, and the -o texts. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "disk.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"

struct words {
	int argc, at;
	char **argv;
};

static void list_options(const struct disk_command *c, char *buf, size_t len)
{
	size_t n = 0;

	buf[0] = '\0';
	for (unsigned i = 0; i < c->nr_options && n < len; i++) {
		const struct disk_option *o = &c->options[i];

		n += o->letter ? (size_t)snprintf(buf + n, len - n, "%s-%c", n ? " " : "", o->letter)
			       : (size_t)snprintf(buf + n, len - n, "%s--%s", n ? " " : "", o->name);
	}
}

static int unknown(const struct disk_command *c, const char *word, struct error *err)
{
	char list[200];

	list_options(c, list, sizeof(list));
	return error_set(err, EINVAL, "unknown option '%s': accepted are %s ('vmm disk %s --help' explains)", word, list,
		c->name);
}

static int store(struct disk_args *a, const struct disk_option *o, const char *spelled, const char *value,
	struct error *err)
{
	void *to = (char *)a + o->at;

	switch (o->kind) {
	case OPTION_FLAG:
		*(bool *)to = true;
		return 0;
	case OPTION_TEXT:
	case OPTION_OPTIONAL:
		*(const char **)to = value;
		return 0;
	case OPTION_SIZE:
		if (parse_size(value, to))
			return error_set(err, EINVAL, "%s: '%s' is no size: 512, 64k, 2M", spelled, value);
		return 0;
	case OPTION_NUMBER:
		if (parse_u64(value, to))
			return error_set(err, EINVAL, "%s: '%s' is no number", spelled, value);
		return 0;
	}
	return 0;
}

static int long_option(struct disk_args *a, struct words *w, const char *word, struct error *err)
{
	const struct disk_command *c = a->command;
	size_t n = strcspn(word, "=");
	const char *value = word[n] ? word + n + 1 : NULL;
	char spelled[40];

	for (unsigned i = 0; i < c->nr_options; i++) {
		const struct disk_option *o = &c->options[i];

		if (strlen(o->name) != n || strncmp(o->name, word, n))
			continue;
		snprintf(spelled, sizeof(spelled), "--%s", o->name);
		if (value && o->kind == OPTION_FLAG)
			return error_set(err, EINVAL, "%s takes no value", spelled);
		if (!value && o->kind == OPTION_OPTIONAL)
			value = "all";
		else if (!value && o->kind != OPTION_FLAG)
			value = w->at < w->argc ? w->argv[w->at++] : NULL;
		if (!value && o->kind != OPTION_FLAG)
			return error_set(err, EINVAL, "%s needs a value: %s", spelled, o->value);
		return store(a, o, spelled, value, err);
	}
	return unknown(c, word - 2, err);
}

/* "-pc", "-fqcow2", "-f qcow2" */
static int short_options(struct disk_args *a, struct words *w, const char *word, struct error *err)
{
	const struct disk_command *c = a->command;

	for (const char *at = word + 1; *at; at++) {
		const struct disk_option *o = NULL;
		char spelled[3] = { '-', *at, '\0' };
		const char *value;

		for (unsigned i = 0; i < c->nr_options; i++)
			if (c->options[i].letter == *at)
				o = &c->options[i];
		if (!o)
			return unknown(c, spelled, err);
		if (o->kind == OPTION_FLAG) {
			store(a, o, spelled, NULL, err);
			continue;
		}
		value = at[1] ? at + 1 : w->at < w->argc ? w->argv[w->at++] : NULL;
		if (!value)
			return error_set(err, EINVAL, "%s needs a value: %s", spelled, o->value);
		return store(a, o, spelled, value, err);
	}
	return 0;
}

static int positional(struct disk_args *a, const char *word, struct error *err)
{
	if (a->nr >= a->command->most)
		return error_set(err, EINVAL, "unexpected argument '%s': usage: vmm disk %s %s", word, a->command->name,
			a->command->usage);
	a->file[a->nr++] = (struct disk_file){ .path = word, .fd = -1 };
	return 0;
}

int disk_parse(struct disk_args *a, int argc, char **argv, struct error *err)
{
	struct words w = { .argc = argc, .argv = argv };
	bool only_files = false;

	while (w.at < argc) {
		const char *word = argv[w.at++];
		int r;

		if (only_files || word[0] != '-' || !word[1] || (a->minus && isdigit((unsigned char)word[1])))
			r = positional(a, word, err);
		else if (!strcmp(word, "--"))
			r = !(only_files = true);
		else if (!strcmp(word, "--help") || !strcmp(word, "-h"))
			return a->help = true, 0;
		else if (word[1] == '-')
			r = long_option(a, &w, word + 2, err);
		else
			r = short_options(a, &w, word, err);
		if (r)
			return r;
	}
	if (a->nr < a->command->least)
		return error_set(err, EINVAL, "something is missing: usage: vmm disk %s %s", a->command->name,
			a->command->usage);
	if (a->output && strcmp(a->output, "json") && strcmp(a->output, "human"))
		return error_set(err, EINVAL, "--output=%s: expected human or json", a->output);
	a->json = a->json || (a->output && !strcmp(a->output, "json"));
	return 0;
}

void disk_command_usage(const struct disk_command *c)
{
	printf("usage: vmm disk %s [OPTION]... %s\n%s\n\n", c->name, c->usage, c->words);
	for (unsigned i = 0; i < c->nr_options; i++) {
		const struct disk_option *o = &c->options[i];
		char left[80], letter[8] = "    ";

		if (o->letter)
			snprintf(letter, sizeof(letter), "-%c, ", o->letter);
		snprintf(left, sizeof(left), "%s--%s%s%s%s", letter, o->name,
			o->kind == OPTION_OPTIONAL ? "[=" : o->value ? " " : "", o->value ? o->value : "",
			o->kind == OPTION_OPTIONAL ? "]" : "");
		printf("  %-30s %s\n", left, o->words);
	}
}

/* ---- -o ---- */

/* qemu-img's keys. Texts are kept to the end. */
static int parse_options(struct disk_args *a, struct opts *o, struct error *err)
{
	static const char *const compats[] = { "0.10", "1.1", "v2", "v3", NULL };
	static const char *const types[] = { "zlib", "zstd", NULL };
	struct image_create *c = &a->create;
	uint64_t cluster = 0, bits = 0;
	int compat = -1, type = 0, r;

	r = opts_size(o, "cluster_size", 512, 256ull << 20, &cluster, err);
	r = r ? r : opts_choice(o, "compat", compats, &compat, err);
	r = r ? r : opts_u64(o, "refcount_bits", 1, 64, &bits, err);
	r = r ? r : opts_bool(o, "extended_l2", &c->extended_l2, err);
	r = r ? r : opts_choice(o, "compression_type", types, &type, err);
	r = r ? r : opts_bool(o, "lazy_refcounts", &c->lazy_refcounts, err);
	r = r ? r : opts_bool(o, "static", &c->fixed, err);
	if (r)
		return r;
	if (opts_str(o, "backing_file")) {
		if (a->backing)
			return error_set(err, EINVAL, "the backing file is named twice: -b and -o backing_file");
		a->backing = strdup(opts_str(o, "backing_file"));
	}
	if (opts_str(o, "backing_fmt"))
		a->backing_format = strdup(opts_str(o, "backing_fmt"));
	if (opts_str(o, "preallocation") && !a->prealloc)
		a->prealloc = strdup(opts_str(o, "preallocation"));
	c->cluster = (uint32_t)cluster;
	c->refcount_bits = (unsigned)bits;
	c->version = compat < 0 ? 0 : compat % 2 ? 3 : 2;
	c->zstd = type == 1;
	return opts_end(o, err);
}

static int parse_prealloc(const char *text, enum image_prealloc *to, struct error *err)
{
	static const char *const names[] = { "off", "metadata", "falloc", "full" };

	for (unsigned i = 0; i < ARRAY_LEN(names); i++) {
		if (!strcmp(text, names[i])) {
			*to = (enum image_prealloc)i;
			return 0;
		}
	}
	return error_set(err, EINVAL, "preallocation '%s': expected off, metadata, falloc or full", text);
}

int disk_parse_create(struct disk_args *a, const char *format, struct error *err)
{
	struct opts *o = NULL;
	int r;

	a->create.format = format ? format : "raw";
	if (a->options) {
		r = opts_parse(&o, "-o", a->options, NULL, err);
		if (!r)
			r = parse_options(a, o, err);
		opts_free(o);
		if (r)
			return r;
	}
	return a->prealloc ? parse_prealloc(a->prealloc, &a->create.prealloc, err) : 0;
}

int disk_open_backing(struct disk_args *a, const char *path, struct error *err)
{
	if (!a->backing && a->backing_format)
		return error_set(err, EINVAL, "-F %s: the format of a backing file, but none is named (-b)", a->backing_format);
	if (!a->backing || !*a->backing)
		return 0;
	if (!a->backing_format)
		return error_set(err, EINVAL, "-b %s: say also its format (-F raw, -F qcow2): it is never guessed", a->backing);
	a->file[a->nr] = (struct disk_file){ .path = disk_beside(path, a->backing), .fd = -1 };
	if (!a->file[a->nr].path)
		return error_set(err, ENOMEM, "out of memory");
	a->backing_at = a->nr;
	return disk_open_file(a, a->backing_at, false, err);
}

const char *disk_size_words(uint64_t bytes, char *buf, size_t len)
{
	static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB" };
	double v = (double)bytes;
	unsigned u = 0;

	for (; v >= 1000 && u + 1 < ARRAY_LEN(units); u++)
		v /= 1024;
	snprintf(buf, len, "%.3g %s", v, units[u]);
	return buf;
}

/* vmm disk info, check, map: what an image says, for people and as JSON with qemu-img's keys. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "disk.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"

int info_prepare(struct disk_args *a, struct error *err)
{
	return disk_open_file(a, 0, false, err);
}

/* An image's words never reach a terminal raw. */
void disk_print(FILE *f, const char *text)
{
	unsigned char was = 0;

	for (const unsigned char *p = (const unsigned char *)text; *p; was = *p++)
		fputc(*p < 0x20 || *p == 0x7f || (was == 0xc2 && *p < 0xa0) ? '?' : *p, f);
}

static void print_pair(const char *indent, const char *key, const char *text)
{
	fputs(indent, stdout);
	disk_print(stdout, key);
	fputs(": ", stdout);
	disk_print(stdout, text);
	putchar('\n');
}

void snapshot_facts(struct facts *f, const struct image_snapshot *list, unsigned n)
{
	for (unsigned k = 0; k < n; k++) {
		struct facts *s = facts_item(f, "snapshots");

		facts_str(s, "id", list[k].id);
		facts_str(s, "name", list[k].name);
		facts_u64(s, "vm-state-size", list[k].vm_state);
		facts_u64(s, "date-sec", list[k].at_ns / 1000000000);
		facts_u64(s, "date-nsec", list[k].at_ns % 1000000000);
		facts_u64(s, "vm-clock-sec", list[k].vm_clock_ns / 1000000000);
		facts_u64(s, "vm-clock-nsec", list[k].vm_clock_ns % 1000000000);
	}
}

/* ---- info ---- */

static void info_json(struct image *i, bool guessed, const struct image_snapshot *list, unsigned n)
{
	struct facts *f = facts_new(), *special;
	auto_free char *text = NULL;

	facts_str(f, "filename", image_path(i));
	facts_str(f, "format", image_format(i));
	facts_bool(f, "format-guessed", guessed);
	facts_u64(f, "virtual-size", image_size(i));
	facts_u64(f, "actual-size", image_disk_usage(i));
	if (image_cluster(i))
		facts_u64(f, "cluster-size", image_cluster(i));
	if (image_backing_name(i)) {
		auto_free char *full = disk_beside(image_path(i), image_backing_name(i));

		facts_str(f, "backing-filename", image_backing_name(i));
		facts_str(f, "full-backing-filename", full ? full : "");
		if (image_backing_format(i))
			facts_str(f, "backing-filename-format", image_backing_format(i));
	}
	snapshot_facts(f, list, n);
	special = facts_object(f, "format-specific");
	facts_str(special, "type", image_format(i));
	image_describe(i, facts_object(special, "data"));
	text = facts_text(f);
	printf("%s", text ? text : "{}");
	facts_free(f);
}

static void print_fact(void *arg, const char *key, const char *text)
{
	if (!(*(unsigned *)arg)++)
		printf("Format specific information:\n");
	print_pair("    ", key, text);
}

static void info_human(struct image *i, bool guessed, const struct image_snapshot *list, unsigned n)
{
	struct facts *f = facts_new();
	char words[32];
	unsigned facts = 0;

	print_pair("", "image", image_path(i));
	printf("file format: %s%s\n", image_format(i), guessed ? " (looks like; -f says it for sure)" : "");
	printf("virtual size: %s (%llu bytes)\n", disk_size_words(image_size(i), words, sizeof(words)),
		(unsigned long long)image_size(i));
	printf("disk size: %s\n", disk_size_words(image_disk_usage(i), words, sizeof(words)));
	if (image_cluster(i))
		printf("cluster_size: %u\n", image_cluster(i));
	if (image_backing_name(i))
		print_pair("", "backing file", image_backing_name(i));
	if (image_backing_format(i))
		print_pair("", "backing file format", image_backing_format(i));
	if (n)
		printf("Snapshot list:\n");
	snapshot_table(list, n);
	image_describe(i, f);
	facts_each(f, print_fact, &facts);
	facts_free(f);
}

int info_work(struct disk_args *a, struct error *err)
{
	bool guessed = !a->format;
	const char *format = guessed ? disk_guess(a, 0) : a->format, *between = "";
	struct image *top;
	int r;

	r = disk_image(a, &top, 0, format, (struct image_how){ .readonly = true, .alone = !a->chain }, err);
	if (r)
		return r;
	if (a->json && a->chain)
		putchar('[');
	for (struct image *i = top; i; i = image_backing(i)) {
		auto_free struct image_snapshot *list = NULL;
		unsigned n = 0;

		if (image_snapshots(i, &list, &n, NULL))        /* or the format has none */
			n = 0;
		fputs(between, stdout);
		if (a->json)
			info_json(i, guessed && i == top, list, n);
		else
			info_human(i, guessed && i == top, list, n);
		between = a->json ? ",\n" : "\n";
	}
	if (a->json)
		puts(a->chain ? "]" : "");
	image_close(top);
	return DISK_OK;
}

/* ---- check ---- */

int check_prepare(struct disk_args *a, struct error *err)
{
	if (a->repair && strcmp(a->repair, "leaks") && strcmp(a->repair, "all"))
		return error_set(err, EINVAL, "-r %s: expected leaks or all", a->repair);
	return disk_open_file(a, 0, a->repair, err);
}

/* qemu-img prints these, too; a damaged image can have millions. */
#define COMPLAINTS_MAX 100

static void complain(struct image_check *c, const char *text)
{
	if (c->words > COMPLAINTS_MAX)
		return;
	disk_print(stderr, text);
	fputs(c->words == COMPLAINTS_MAX ? "\n(more of this is not shown)\n" : "\n", stderr);
}

static void check_json(const struct disk_args *a, const struct image *i, const struct image_check *c,
	const struct image_check *before)
{
	struct facts *f = facts_new();
	auto_free char *text = NULL;

	facts_str(f, "filename", a->file[0].path);
	facts_str(f, "format", image_format(i));
	facts_u64(f, "check-errors", c->errors);
	facts_u64(f, "image-end-offset", c->end);
	facts_u64(f, "corruptions", c->corruptions);
	facts_u64(f, "leaks", c->leaks);
	facts_u64(f, "corruptions-fixed", before->fixed_corruptions);
	facts_u64(f, "leaks-fixed", before->fixed_leaks);
	facts_u64(f, "total-clusters", c->clusters);
	facts_u64(f, "allocated-clusters", c->allocated);
	facts_u64(f, "fragmented-clusters", c->fragmented);
	facts_u64(f, "compressed-clusters", c->compressed);
	text = facts_text(f);
	printf("%s\n", text ? text : "{}");
	facts_free(f);
}

static void check_human(const struct image_check *c, const struct image_check *before)
{
	double of = c->allocated ? (double)c->allocated : 1;

	if (before->fixed_corruptions || before->fixed_leaks)
		printf("Mended: %llu errors, %llu leaks. Checked again:\n", (unsigned long long)before->fixed_corruptions,
			(unsigned long long)before->fixed_leaks);
	if (!c->corruptions && !c->leaks && !c->errors)
		printf("No errors were found on the image.\n");
	if (c->corruptions)
		printf("%llu errors were found on the image: data may be lost. Copy what is readable (vmm disk convert), then mend "
			"(-r all).\n", (unsigned long long)c->corruptions);
	if (c->leaks)
		printf("%llu leaked clusters: space is wasted, data is safe (-r leaks frees it).\n", (unsigned long long)c->leaks);
	if (c->errors)
		printf("%llu places could not be checked.\n", (unsigned long long)c->errors);
	if (c->clusters)
		printf("%llu/%llu = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			(unsigned long long)c->allocated, (unsigned long long)c->clusters,
			100 * (double)c->allocated / (double)c->clusters, 100 * (double)c->fragmented / of,
			100 * (double)c->compressed / of);
	if (c->end)
		printf("Image end offset: %llu\n", (unsigned long long)c->end);
}

/* After a repair the image is looked at once more: what counts is what is left. */
static int check(struct disk_args *a, struct image *i, struct image_check *c, struct image_check *before,
	struct error *err)
{
	enum image_repair repair = !a->repair ? REPAIR_NONE : !strcmp(a->repair, "all") ? REPAIR_ALL : REPAIR_LEAKS;
	int r = image_check(i, repair, c, err);

	*before = *c;
	if (r || (!c->fixed_corruptions && !c->fixed_leaks))
		return r;
	r = image_flush(i);
	if (r)
		return error_errno(err, -r, "'%s': cannot write its metadata", a->file[0].path);
	*c = (struct image_check){ .complain = c->complain };
	return image_check(i, REPAIR_NONE, c, err);
}

int check_work(struct disk_args *a, struct error *err)
{
	struct image_check c = { .complain = a->quiet ? NULL : complain }, before;
	struct image *i;
	int r, e;

	r = disk_image(a, &i, 0, a->format,
		(struct image_how){ .readonly = !a->repair, .alone = true, .repair = a->repair }, err);
	if (r)
		return r;
	r = check(a, i, &c, &before, err);
	if (!r && a->json)
		check_json(a, i, &c, &before);
	else if (!r && !a->quiet)
		check_human(&c, &before);
	if (r && !err->msg[0])
		error_errno(err, -r, "'%s': cannot check it", a->file[0].path);
	e = image_close(i);
	if (!r && e)
		r = error_errno(err, -e, "'%s': cannot write its metadata", a->file[0].path);
	if (r == -EOPNOTSUPP) {
		log_error("disk check: %s", err->msg);
		return DISK_UNSUPPORTED;
	}
	return r ? r : c.errors ? DISK_FAILED : c.corruptions ? DISK_CORRUPT : c.leaks ? DISK_LEAKS : DISK_OK;
}

/* ---- map ---- */

static bool has_data(const struct image_status *s)
{
	return s->kind == EXT_DATA || s->kind == EXT_COMPRESSED;
}

static const char *path_at(const struct image *i, unsigned depth)
{
	while (depth-- && image_backing(i))
		i = image_backing(i);
	return image_path(i);
}

static void map_line(const struct disk_args *a, const struct image *i, uint64_t off, const struct image_status *s,
	bool first)
{
	if (a->json) {
		printf("%s{ \"start\": %llu, \"length\": %llu, \"depth\": %u, \"present\": %s, \"zero\": %s, \"data\": %s, "
			"\"compressed\": %s", first ? "[" : ",\n", (unsigned long long)off, (unsigned long long)s->len, s->depth,
			s->kind == EXT_HOLE ? "false" : "true", has_data(s) ? "false" : "true", has_data(s) ? "true" : "false",
			s->kind == EXT_COMPRESSED ? "true" : "false");
		if (s->kind == EXT_DATA)
			printf(", \"offset\": %llu", (unsigned long long)s->host);
		printf("}");
		return;
	}
	if (!has_data(s))
		return;
	printf("%#-16llx%#-16llx", (unsigned long long)off, (unsigned long long)s->len);
	if (s->kind == EXT_DATA)
		printf("%#-16llx", (unsigned long long)s->host);
	else
		printf("%-16s", "compressed");
	disk_print(stdout, path_at(i, s->depth));
	putchar('\n');
}

/* One stretch goes on in the next. */
static bool joins(const struct image_status *s, const struct image_status *next)
{
	return s->kind == next->kind && s->depth == next->depth && (s->kind != EXT_DATA || s->host + s->len == next->host);
}

int map_work(struct disk_args *a, struct error *err)
{
	struct image_status s = { .len = 0 }, next;
	uint64_t off = 0, size;
	bool first = true;
	struct image *i;
	int r;

	r = disk_image(a, &i, 0, a->format, (struct image_how){ .readonly = true }, err);
	if (r)
		return r;
	if (!a->json)
		printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
	for (size = image_size(i); !r && off + s.len < size;) {
		r = image_status(i, off + s.len, size - off - s.len, &next);
		if (r) {
			error_errno(err, -r, "'%s': cannot look where offset %llu lies", a->file[0].path,
				(unsigned long long)(off + s.len));
		} else if (s.len && joins(&s, &next)) {
			s.len += next.len;
		} else {
			if (s.len) {
				map_line(a, i, off, &s, first);
				first = false;
			}
			off += s.len;
			s = next;
		}
	}
	if (!r)
		map_line(a, i, off, &s, first);
	if (a->json)
		puts(r ? "" : "]");
	image_close(i);
	return r;
}

/*
 * The text descriptor of a VMDK image (VMware, "Virtual Disk Format 5.0", "The Descriptor File"). Lines of three kinds:
 *
 *      # a comment
 *      key = value             or "value"
 *      ACCESS SECTORS TYPE "NAME" OFFSET       an extent; in the order in which they make up the disk
 *
 * A line that is none of them is refused: skipping an extent would move everything behind it.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/image.h"
#include "vmdk.h"

#define SECTORS_MAX (IMAGE_SIZE_MAX / 512)
#define LINE_BYTES 1024

struct parser {
	struct vmdk_desc *d;
	struct error *err;
	unsigned nr;                    /* of the line, from 1 */
	uint64_t sectors;               /* of all extents so far */
	bool parent_seen;
};

static char *trim(char *s)
{
	size_t n;

	while (*s == ' ' || *s == '\t')
		s++;
	for (n = strlen(s); n && strchr(" \t\r", s[n - 1]);)
		s[--n] = 0;
	return s;
}

/* Digits and nothing else, at most max. */
static bool number(const char *s, uint64_t max, uint64_t *ret)
{
	uint64_t v = 0;

	if (!*s)
		return false;
	for (; *s; s++) {
		if (*s < '0' || *s > '9')
			return false;
		v = v * 10 + (uint64_t)(*s - '0');
		if (v > max)
			return false;
	}
	*ret = v;
	return true;
}

/* ---- extents ---- */

/* The next word of *s, which moves on; empty at the end. */
static char *word(char **s)
{
	char *w = *s + strspn(*s, " \t"), *end = w + strcspn(w, " \t");

	*s = *end ? end + 1 : end;
	*end = 0;
	return w;
}

/* The next word, in quotes; NULL: it is not. */
static char *quoted(char **s)
{
	char *w = *s + strspn(*s, " \t"), *end = *w == '"' ? strchr(w + 1, '"') : NULL;

	if (!end || (end[1] && !strchr(" \t", end[1])))
		return NULL;
	*s = end[1] ? end + 2 : end + 1;
	*end = 0;
	return w + 1;
}

static int extent_type(struct parser *p, const char *w, enum vmdk_type *ret)
{
	static const char *const names[] = { [VMDK_FLAT] = "FLAT", [VMDK_SPARSE] = "SPARSE", [VMDK_ZERO] = "ZERO" };

	for (unsigned t = 0; t < ARRAY_LEN(names); t++) {
		if (!strcmp(w, names[t])) {
			*ret = t;
			return 0;
		}
	}
	if (!strncmp(w, "VMFS", 4) || !strcmp(w, "SESPARSE"))
		return error_set(p->err, EOPNOTSUPP, "its extents are of type %s, of an ESX server: 'vmkfstools -i IN -d 2gbsparse OUT' "
			"there, or a copy as monolithicSparse, can be read", w);
	return error_set(p->err, EINVAL, "line %u of its descriptor: an extent of type '%.40s': one of FLAT, SPARSE, ZERO",
		p->nr, w);
}

static int extent_name(struct parser *p, struct vmdk_line *l, const char *name)
{
	size_t n = name ? strlen(name) : 0;

	if (!n || n >= sizeof(l->name))
		return error_set(p->err, EINVAL, "line %u of its descriptor: an extent needs a file name in quotes, of 1 to %zu bytes",
			p->nr, sizeof(l->name) - 1);
	if (strpbrk(name, "/\\") || !strcmp(name, ".") || !strcmp(name, ".."))
		return error_set(p->err, EACCES, "its extent '%s' does not lie beside it: only a plain file name is opened", name);
	memcpy(l->name, name, n + 1);
	return 0;
}

static struct vmdk_line *new_line(struct vmdk_desc *d)
{
	if (d->n == d->room) {
		unsigned room = d->room ? d->room * 2 : 8;
		struct vmdk_line *more = reallocarray(d->line, room, sizeof(*more));

		if (!more)
			return NULL;
		d->line = more;
		d->room = room;
	}
	d->line[d->n] = (struct vmdk_line){ 0 };
	return &d->line[d->n++];
}

static int extent(struct parser *p, bool no_access, char *rest)
{
	const char *size = word(&rest), *type = word(&rest), *off;
	struct vmdk_line *l;
	int r;

	if (p->d->n == VMDK_EXTENTS)
		return error_set(p->err, EOPNOTSUPP, "it has more than %u extents", VMDK_EXTENTS);
	l = new_line(p->d);
	if (!l)
		return error_set(p->err, ENOMEM, "out of memory");
	l->no_access = no_access;
	if (!number(size, SECTORS_MAX, &l->sectors) || !l->sectors)
		return error_set(p->err, EINVAL, "line %u of its descriptor: an extent of '%.40s' sectors: 1 to %llu", p->nr,
			size, (unsigned long long)SECTORS_MAX);
	p->sectors += l->sectors;
	if (p->sectors > SECTORS_MAX)
		return error_set(p->err, EFBIG, "its extents are more than 64T");
	r = extent_type(p, type, &l->type);
	if (!r && l->type != VMDK_ZERO)
		r = extent_name(p, l, quoted(&rest));
	if (r)
		return r;
	off = word(&rest);
	if (*off && (l->type == VMDK_ZERO || !number(off, SECTORS_MAX, &l->offset) ||
		(l->type == VMDK_SPARSE && l->offset)))
		return error_set(p->err, EINVAL, "line %u of its descriptor: an offset of '%.40s' sectors is not one of an extent of type %s",
			p->nr, off, type);
	if (*trim(rest))
		return error_set(p->err, EINVAL, "line %u of its descriptor: '%.40s' behind an extent", p->nr, trim(rest));
	return 0;
}

/* ---- keys ---- */

static int parent_cid(struct parser *p, const char *val)
{
	if (p->parent_seen)
		return error_set(p->err, EINVAL, "its descriptor has parentCID twice");
	p->parent_seen = true;
	if (!strcasecmp(val, "ffffffff"))
		return 0;
	return error_set(p->err, EOPNOTSUPP, "it holds only the changes to another image (parentCID=%.8s): "
		"'qemu-img convert' or VMware's 'vmware-vdiskmanager -r' makes a whole one of both", val);
}

static int create_type(struct parser *p, const char *val)
{
	if (*p->d->create_type)
		return error_set(p->err, EINVAL, "its descriptor has createType twice");
	if (!*val || strlen(val) >= sizeof(p->d->create_type))
		return error_set(p->err, EINVAL, "its createType '%.40s' is unknown", val);
	strcpy(p->d->create_type, val);
	return 0;
}

static int key_value(struct parser *p, char *key, char *val)
{
	size_t n = strlen(val);
	uint64_t version;

	if (n >= 2 && *val == '"' && val[n - 1] == '"') {
		val[n - 1] = 0;
		val++;
	}
	if (!strcasecmp(key, "createType"))
		return create_type(p, val);
	if (!strcasecmp(key, "parentCID"))
		return parent_cid(p, val);
	if (!strncasecmp(key, "encryption", 10))
		return error_set(p->err, EOPNOTSUPP, "it is encrypted: remove the encryption in VMware first");
	if (!strcasecmp(key, "version") && (!number(val, 4, &version) || !version))
		return error_set(p->err, EOPNOTSUPP, "its descriptor has version '%.40s': 1 to 4 can be read", val);
	return 0;
}

static int line(struct parser *p, char *s)
{
	static const char *const access[] = { "RW", "RDONLY", "NOACCESS" };
	char *eq;

	s = trim(s);
	if (!*s || *s == '#')
		return 0;
	for (unsigned a = 0; a < ARRAY_LEN(access); a++) {
		size_t n = strlen(access[a]);

		if (!strncmp(s, access[a], n) && (s[n] == ' ' || s[n] == '\t'))
			return extent(p, a == 2, s + n);
	}
	eq = strchr(s, '=');
	if (!eq)
		return error_set(p->err, EINVAL, "line %u of its descriptor is not understood: '%.60s'", p->nr, s);
	*eq = 0;
	return key_value(p, trim(s), trim(eq + 1));
}

int vmdk_desc_parse(struct vmdk_desc *d, const char *text, size_t n, struct error *err)
{
	struct parser p = { .d = d, .err = err };
	size_t len;
	int r = 0;

	*d = (struct vmdk_desc){ 0 };
	n = strnlen(text, n);
	if (n < sizeof(VMDK_MAGIC) - 1 || memcmp(text, VMDK_MAGIC, sizeof(VMDK_MAGIC) - 1))
		return error_set(err, EINVAL, "it has no VMDK descriptor (a text that begins with '" VMDK_MAGIC "')");
	for (; n && !r; text += len, n -= len) {
		const char *end = memchr(text, '\n', n);
		char copy[LINE_BYTES];

		len = end ? (size_t)(end - text) : n;
		p.nr++;
		if (len >= sizeof(copy))
			return error_set(err, EINVAL, "line %u of its descriptor is longer than %zu bytes", p.nr,
				sizeof(copy) - 1);
		memcpy(copy, text, len);
		copy[len] = 0;
		r = line(&p, copy);
		len += end != NULL;
	}
	if (!r && !*d->create_type)
		r = error_set(err, EINVAL, "its descriptor has no createType");
	if (!r && !d->n)
		r = error_set(err, EINVAL, "its descriptor has no extents");
	return r;
}

void vmdk_desc_free(struct vmdk_desc *d)
{
	free(d->line);
	*d = (struct vmdk_desc){ 0 };
}

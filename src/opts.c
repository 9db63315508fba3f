#include "vmm/opts.h"
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define MAX_PARTS 64
#define MAX_KNOWN 64

struct part {
	char *key, *val;        /* val NULL: a flag */
};

struct opts {
	char *option;
	char *text;             /* what the parts point into */
	struct part part[MAX_PARTS];
	unsigned nr;
	const char *known[MAX_KNOWN];
	unsigned nr_known;
};

/* Cut text at single commas in place; ",," stands for one comma. Returns the next part or NULL. */
static char *next_part(char **rest)
{
	char *start = *rest, *in = start, *out = start;

	if (!start)
		return NULL;
	for (; *in; in++) {
		if (*in == ',') {
			if (in[1] != ',')
				break;
			in++;
		}
		*out++ = *in;
	}
	*rest = *in ? in + 1 : NULL;
	*out = '\0';
	return start;
}

int opts_parse(struct opts **ret, const char *option, const char *text, const char *implied,
	struct error *err)
{
	struct opts *o = calloc(1, sizeof(*o));
	char *rest, *p;

	if (!o || !(o->option = strdup(option)) || !(o->text = strdup(text))) {
		opts_free(o);
		return error_set(err, ENOMEM, "out of memory");
	}
	rest = o->text;
	for (bool first = true; (p = next_part(&rest)); first = false) {
		char *eq = strchr(p, '=');
		struct part *part = &o->part[o->nr];

		if (!*p && first && !rest)
			break;          /* "--rng ''": nothing said */
		if (o->nr == MAX_PARTS) {
			opts_free(o);
			return error_set(err, EINVAL, "%s: more than %d parts", option, MAX_PARTS);
		}
		if (first && implied && !eq) {
			*part = (struct part){ (char *)implied, p };
		} else if (eq) {
			*eq = '\0';
			*part = (struct part){ p, eq + 1 };
		} else {
			*part = (struct part){ p, NULL };
		}
		if (!*part->key) {
			opts_free(o);
			return error_set(err, EINVAL, "%s: empty part in '%s'", option, text);
		}
		o->nr++;
	}
	*ret = o;
	return 0;
}

void opts_free(struct opts *o)
{
	if (!o)
		return;
	free(o->option);
	free(o->text);
	free(o);
}

const char *opts_option(const struct opts *o)
{
	return o->option;
}

static void know(struct opts *o, const char *key)
{
	for (unsigned i = 0; i < o->nr_known; i++)
		if (!strcmp(o->known[i], key))
			return;
	if (o->nr_known < MAX_KNOWN)
		o->known[o->nr_known++] = key;
}

static const struct part *find(struct opts *o, const char *key, unsigned n)
{
	know(o, key);
	for (unsigned i = 0; i < o->nr; i++)
		if (!strcmp(o->part[i].key, key) && n-- == 0)
			return &o->part[i];
	return NULL;
}

const char *opts_nth(struct opts *o, const char *key, unsigned i)
{
	const struct part *p = find(o, key, i);

	return p ? p->val ? p->val : "" : NULL;
}

const char *opts_str(struct opts *o, const char *key)
{
	return opts_nth(o, key, 0);
}

int opts_bool(struct opts *o, const char *key, bool *val, struct error *err)
{
	static const char *const on[] = { "on", "yes", "true", "1" };
	static const char *const off[] = { "off", "no", "false", "0" };
	const struct part *p = find(o, key, 0);

	if (!p)
		return 0;
	if (!p->val) {
		*val = true;
		return 0;
	}
	for (unsigned i = 0; i < ARRAY_LEN(on); i++) {
		if (!strcasecmp(p->val, on[i]) || !strcasecmp(p->val, off[i])) {
			*val = !strcasecmp(p->val, on[i]);
			return 0;
		}
	}
	return error_set(err, EINVAL, "%s: %s=%s: expected on or off", o->option, key, p->val);
}

static int number(struct opts *o, const char *key, int (*parse)(const char *, uint64_t *),
	const char *kind, uint64_t min, uint64_t max, uint64_t *val, struct error *err)
{
	const struct part *p = find(o, key, 0);
	uint64_t v;

	if (!p)
		return 0;
	if (!p->val || parse(p->val, &v))
		return error_set(err, EINVAL, "%s: %s=%s: expected %s", o->option, key,
			p->val ? p->val : "", kind);
	if (v < min || v > max)
		return error_set(err, EINVAL, "%s: %s=%s: must be %llu to %llu", o->option, key,
			p->val, (unsigned long long)min, (unsigned long long)max);
	*val = v;
	return 0;
}

int opts_u64(struct opts *o, const char *key, uint64_t min, uint64_t max, uint64_t *val,
	struct error *err)
{
	return number(o, key, parse_u64, "a number", min, max, val, err);
}

int opts_size(struct opts *o, const char *key, uint64_t min, uint64_t max, uint64_t *val,
	struct error *err)
{
	return number(o, key, parse_size, "a size such as 512, 64K or 2G", min, max, val, err);
}

/* "a, b or c"; of what does not fit the first ones, and "..." */
static void list_words(char *buf, size_t len, const char *const *words, unsigned nr)
{
	size_t n = 0;

	buf[0] = '\0';
	for (unsigned i = 0; i < nr; i++) {
		if (n + strlen(words[i]) + sizeof(" or , ...") > len) {
			snprintf(buf + n, len - n, ", ...");
			return;
		}
		n += (size_t)snprintf(buf + n, len - n, "%s%s", i == 0 ? "" : i + 1 == nr ? " or " : ", ", words[i]);
	}
}

int opts_choice(struct opts *o, const char *key, const char *const *choices, int *val,
	struct error *err)
{
	const struct part *p = find(o, key, 0);
	char words[200];
	int i;

	if (!p)
		return 0;
	for (i = 0; choices[i]; i++) {
		if (p->val && !strcmp(p->val, choices[i])) {
			*val = i;
			return 0;
		}
	}
	list_words(words, sizeof(words), choices, (unsigned)i);
	return error_set(err, EINVAL, "%s: %s=%s: expected %s", o->option, key,
		p->val ? p->val : "", words);
}

/* A known key that differs by a slip of the finger; NULL: none. */
static const char *meant(const struct opts *o, const char *key)
{
	const char *best = NULL;
	unsigned least = strlen(key) < 4 ? 2 : 3;

	for (unsigned k = 0; k < o->nr_known; k++) {
		unsigned d = word_distance(key, o->known[k]);

		if (d < least) {
			least = d;
			best = o->known[k];
		}
	}
	return best;
}

int opts_end(struct opts *o, struct error *err)
{
	for (unsigned i = 0; i < o->nr; i++) {
		const char *near;
		char words[300];
		unsigned k;

		for (k = 0; k < o->nr_known && strcmp(o->known[k], o->part[i].key); k++)
			;
		if (k < o->nr_known)
			continue;
		list_words(words, sizeof(words), o->known, o->nr_known);
		near = meant(o, o->part[i].key);
		return error_set(err, EINVAL, "%s: unknown key '%s'%s%s%s: accepted are %s", o->option, o->part[i].key,
			near ? " (" : "", near ? near : "", near ? "?)" : "", o->nr_known ? words : "none");
	}
	return 0;
}

int parse_u64(const char *s, uint64_t *val)
{
	char *end;

	if (!isdigit((unsigned char)*s))
		return -EINVAL;
	errno = 0;
	*val = strtoull(s, &end, s[0] == '0' && (s[1] | 0x20) == 'x' ? 16 : 10);
	return errno || *end ? -EINVAL : 0;
}

int parse_size(const char *s, uint64_t *val)
{
	static const char units[] = "KMGTP";
	unsigned shift = 0;
	uint64_t v;
	char *end;
	const char *u;

	if (!isdigit((unsigned char)*s))
		return -EINVAL;
	errno = 0;
	v = strtoull(s, &end, s[0] == '0' && (s[1] | 0x20) == 'x' ? 16 : 10);
	if (errno)
		return -EINVAL;
	if (*end && (u = strchr(units, toupper((unsigned char)*end)))) {
		shift = 10 * (unsigned)(u - units + 1);
		end++;
		if (end[0] == 'i' && end[1] == 'B')
			end += 2;
		else if (end[0] == 'B')
			end++;
	} else if (end[0] == 'B') {
		end++;
	}
	if (*end || (shift && v >> (64 - shift)))
		return -EINVAL;
	*val = v << shift;
	return 0;
}

int parse_seconds(const char *s, uint64_t *ns)
{
	static const struct {
		const char *name;
		double ns;
	} units[] = { { "", 1e9 }, { "us", 1e3 }, { "ms", 1e6 }, { "s", 1e9 }, { "m", 60e9 }, { "h", 3600e9 },
		{ "d", 86400e9 } };
	char *end;
	double v;

	if (!isdigit((unsigned char)*s) || (s[0] == '0' && (s[1] | 0x20) == 'x'))
		return -EINVAL;
	v = strtod(s, &end);
	for (unsigned i = 0; i < ARRAY_LEN(units); i++) {
		if (strcmp(end, units[i].name))
			continue;
		v *= units[i].ns;
		if (!isfinite(v) || v > 9e18)
			return -EINVAL;
		*ns = (uint64_t)v;
		return 0;
	}
	return -EINVAL;
}

unsigned word_distance(const char *a, const char *b)
{
	unsigned row[64], n = (unsigned)strlen(b);

	if (n >= ARRAY_LEN(row))
		return UINT_MAX;
	for (unsigned j = 0; j <= n; j++)
		row[j] = j;
	for (unsigned i = 1; a[i - 1]; i++) {
		unsigned diagonal = row[0];

		row[0] = i;
		for (unsigned j = 1; j <= n; j++) {
			unsigned up = row[j], swap = diagonal + (a[i - 1] != b[j - 1]);

			row[j] = MIN(swap, MIN(up, row[j - 1]) + 1);
			diagonal = up;
		}
	}
	return row[n];
}

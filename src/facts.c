#include "vmm/facts.h"
#include <json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A struct facts * is a json_object * under another name: json-c owns the children. */
static struct json_object *json(struct facts *f)
{
	return (struct json_object *)f;
}

void facts_u64(struct facts *f, const char *key, uint64_t val)
{
	json_object_object_add(json(f), key, json_object_new_uint64(val));
}

void facts_i64(struct facts *f, const char *key, int64_t val)
{
	json_object_object_add(json(f), key, json_object_new_int64(val));
}

void facts_f64(struct facts *f, const char *key, double val)
{
	char text[40];

	snprintf(text, sizeof(text), "%.6f", val);
	json_object_object_add(json(f), key, json_object_new_double_s(val, text));
}

void facts_bool(struct facts *f, const char *key, bool val)
{
	json_object_object_add(json(f), key, json_object_new_boolean(val));
}

/* Length of the UTF-8 sequence at s, or 0 if it is not one (RFC 3629: shortest form, no surrogates). */
static unsigned utf8_len(const unsigned char *s)
{
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	unsigned n = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;
	uint32_t c = n > 1 ? s[0] & 0x7f >> n : s[0];

	for (unsigned i = 1; i < n; i++) {
		if (s[i] >> 6 != 2)
			return 0;
		c = c << 6 | (s[i] & 0x3f);
	}
	return c < least[n] || c >> 11 == 0x1b || c > 0x10ffff ? 0 : n;
}

/* Bytes that are not UTF-8 (paths, guest words) become \xNN, so that the result is always valid JSON. */
void facts_str(struct facts *f, const char *key, const char *val)
{
	char *out, *o;

	if (!val) {
		json_object_object_add(json(f), key, NULL);
		return;
	}
	out = o = malloc(4 * strlen(val) + 1);
	if (!out)
		return;
	for (const unsigned char *s = (const unsigned char *)val; *s;) {
		unsigned n = utf8_len(s);

		if (n) {
			memcpy(o, s, n);
			o += n;
			s += n;
		} else {
			o += sprintf(o, "\\x%02x", *s++);
		}
	}
	*o = '\0';
	json_object_object_add(json(f), key, json_object_new_string(out));
	free(out);
}

struct facts *facts_object(struct facts *f, const char *key)
{
	struct json_object *child = json_object_new_object();

	json_object_object_add(json(f), key, child);
	return (struct facts *)child;
}

struct facts *facts_item(struct facts *f, const char *key)
{
	struct json_object *list, *child = json_object_new_object();

	if (!json_object_object_get_ex(json(f), key, &list)) {
		list = json_object_new_array();
		json_object_object_add(json(f), key, list);
	}
	json_object_array_add(list, child);
	return (struct facts *)child;
}

void facts_each(struct facts *f, void (*fn)(void *arg, const char *key, const char *text), void *arg)
{
	json_object_object_foreach(json(f), key, val)
		fn(arg, key, val ? json_object_get_string(val) : "");
}

struct facts *facts_new(void)
{
	return (struct facts *)json_object_new_object();
}

char *facts_text(struct facts *f)
{
	return strdup(json_object_to_json_string_ext(json(f),
		JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE));
}

void facts_free(struct facts *f)
{
	json_object_put(json(f));
}

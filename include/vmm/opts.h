#ifndef VMM_OPTS_H
#define VMM_OPTS_H
/*
 * "VALUE,key=value,flag" strings as the command line has them (",," is a literal comma). Each getter marks
 * its key as known; opts_end() then refuses what nobody asked for, naming the option, the key found and
 * the keys accepted. Main thread.
 */
#include <stdbool.h>
#include <stdint.h>
struct error;
struct opts;

/* option: "--disk", for messages. implied: key that a first part without "=" is given to, or NULL. */
int  opts_parse(struct opts **ret, const char *option, const char *text, const char *implied,
	struct error *err);
void opts_free(struct opts *o);         /* NULL is fine */
const char *opts_option(const struct opts *o);

/* NULL or the default where the key is absent. The pointers live as long as o. */
const char *opts_str(struct opts *o, const char *key);
/* The i-th value of a key that may be repeated (fwd=), NULL past the last. */
const char *opts_nth(struct opts *o, const char *key, unsigned i);
/* 0, or -EINVAL with words. *val is left alone where the key is absent. */
int  opts_bool(struct opts *o, const char *key, bool *val, struct error *err);  /* flag, =on|off|yes|no|true|false|1|0 */
int  opts_u64(struct opts *o, const char *key, uint64_t min, uint64_t max, uint64_t *val,
	struct error *err);
int  opts_size(struct opts *o, const char *key, uint64_t min, uint64_t max, uint64_t *val,
	struct error *err);             /* 512, 4K, 2M, 1G, 1T */
/* One of a NULL-terminated list; *val is its index. */
int  opts_choice(struct opts *o, const char *key, const char *const *choices, int *val,
	struct error *err);
/* All keys were asked for: else -EINVAL with words. Call last. */
int  opts_end(struct opts *o, struct error *err);

/* The same syntax for whole values. 0 or -EINVAL, no words. */
int  parse_size(const char *s, uint64_t *val);          /* bytes; K M G T, with or without B or iB */
int  parse_u64(const char *s, uint64_t *val);           /* decimal, 0x hex */
int  parse_seconds(const char *s, uint64_t *ns);        /* 30, 1.5, 500ms, 20us, 30s, 5m, 1h */

/* Edit distance (Levenshtein) of two words, for "did you mean"; UINT_MAX where b has 64 bytes or more. */
unsigned word_distance(const char *a, const char *b);
#endif

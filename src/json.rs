//! The smallest JSON writer that is correct: objects, arrays and the escapes of RFC 8259.

use std::fmt::Write;

/// A JSON object that grows by one member per call.
///
/// Keys appear in the order of the calls; using one twice is the caller's mistake.
#[derive(Clone, Debug, Default)]
pub(crate) struct JsonObject {
    members: String,
}

impl JsonObject {
    pub(crate) fn new() -> JsonObject {
        JsonObject::default()
    }

    pub(crate) fn string(self, key: &str, value: &str) -> JsonObject {
        self.raw(key, &quoted(value))
    }

    pub(crate) fn number(self, key: &str, value: u64) -> JsonObject {
        self.raw(key, &value.to_string())
    }

    /// A number rounded to three places. JSON has no word for NaN and infinity, so they become
    /// `null`.
    pub(crate) fn float(self, key: &str, value: f64) -> JsonObject {
        if value.is_finite() { self.raw(key, &format!("{value:.3}")) } else { self.null(key) }
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> JsonObject {
        self.raw(key, if value { "true" } else { "false" })
    }

    pub(crate) fn null(self, key: &str) -> JsonObject {
        self.raw(key, "null")
    }

    /// A member whose value is JSON already, or not known.
    pub(crate) fn raw_or_null(self, key: &str, json: Option<String>) -> JsonObject {
        self.raw(key, json.as_deref().unwrap_or("null"))
    }

    /// A member whose value is JSON already: a finished object or an [`array()`].
    pub(crate) fn raw(mut self, key: &str, json: &str) -> JsonObject {
        let comma = if self.members.is_empty() { "" } else { "," };
        self.members.push_str(comma);
        self.members.push_str(&quoted(key));
        self.members.push(':');
        self.members.push_str(json);
        self
    }

    /// The object's text.
    pub(crate) fn finish(self) -> String {
        format!("{{{}}}", self.members)
    }
}

/// A JSON array of values that are JSON already.
pub(crate) fn array(values: impl IntoIterator<Item = String>) -> String {
    let values: Vec<String> = values.into_iter().collect();
    format!("[{}]", values.join(","))
}

/// A JSON string: in quotation marks, escaped.
pub(crate) fn quoted(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    json.push('"');
    for letter in text.chars() {
        match letter {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            control if control < ' ' => {
                // Writing to a String does not fail.
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_has_its_members_in_order() {
        let json = JsonObject::new()
            .string("name", "echo")
            .number("accepted", u64::MAX)
            .float("cpus", 1.5)
            .bool("balanced", true)
            .null("refusal")
            .raw("cores", &array((0..2).map(|core| core.to_string())))
            .finish();
        assert_eq!(
            json,
            "{\"name\":\"echo\",\"accepted\":18446744073709551615,\"cpus\":1.500,\
             \"balanced\":true,\"refusal\":null,\"cores\":[0,1]}"
        );
    }

    #[test]
    fn nothing_is_an_empty_object_or_array() {
        assert_eq!(JsonObject::new().finish(), "{}");
        assert_eq!(array([]), "[]");
    }

    #[test]
    fn quotes_backslashes_and_controls_are_escaped_and_the_rest_is_not() {
        assert_eq!(quoted("a\"b\\c/d"), "\"a\\\"b\\\\c/d\"");
        assert_eq!(quoted("\n\r\t\u{0}\u{1f}\u{7f}"), "\"\\n\\r\\t\\u0000\\u001f\u{7f}\"");
        assert_eq!(quoted("Zürich 🦀 \u{2028}"), "\"Zürich 🦀 \u{2028}\"");
        assert_eq!(JsonObject::new().bool("\"", false).finish(), "{\"\\\"\":false}");
    }

    #[test]
    fn numbers_that_json_cannot_write_are_null() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(JsonObject::new().float("x", value).finish(), "{\"x\":null}");
        }
        assert_eq!(JsonObject::new().float("x", 2.0).finish(), "{\"x\":2.000}");
    }
}

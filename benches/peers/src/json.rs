//! Just enough JSON for writing results.

use std::fmt::{self, Write};

/// A value; objects keep the order that they are written in.
#[derive(Clone, Debug)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(&'static str, Json)>),
}

impl From<f64> for Json {
    fn from(number: f64) -> Self {
        // JSON has no NaN.
        if number.is_finite() { Self::Number(number) } else { Self::Null }
    }
}

impl From<u64> for Json {
    fn from(number: u64) -> Self {
        Self::Number(number as f64)
    }
}

impl From<usize> for Json {
    fn from(number: usize) -> Self {
        Self::Number(number as f64)
    }
}

impl From<bool> for Json {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Json {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl<T: Into<Json>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

impl FromIterator<Json> for Json {
    fn from_iter<I: IntoIterator<Item = Json>>(values: I) -> Self {
        Self::List(values.into_iter().collect())
    }
}

/// One line; `{:#}` puts the members of the outer three levels on lines of their own.
impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let levels = if f.alternate() { LEVELS } else { 0 };
        self.write(f, 0, levels)
    }
}

impl Json {
    fn write(&self, f: &mut fmt::Formatter<'_>, level: usize, levels: usize) -> fmt::Result {
        let lines = level < levels;
        let between = |f: &mut fmt::Formatter<'_>, index: usize, inner: usize| {
            f.write_str(if index > 0 { "," } else { "" })?;
            if lines { write!(f, "\n{:width$}", "", width = 2 * inner) } else { Ok(()) }
        };
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(number) if number.fract() == 0.0 => write!(f, "{number:.0}"),
            Self::Number(number) => write!(f, "{number:.4}"),
            Self::Text(text) => quote(f, text),
            Self::List(values) => {
                f.write_char('[')?;
                for (index, value) in values.iter().enumerate() {
                    between(f, index, level + 1)?;
                    value.write(f, level + 1, levels)?;
                }
                if !values.is_empty() {
                    between(f, 0, level)?;
                }
                f.write_char(']')
            }
            Self::Object(members) => {
                f.write_char('{')?;
                for (index, (name, value)) in members.iter().enumerate() {
                    between(f, index, level + 1)?;
                    quote(f, name)?;
                    f.write_str(": ")?;
                    value.write(f, level + 1, levels)?;
                }
                if !members.is_empty() {
                    between(f, 0, level)?;
                }
                f.write_char('}')
            }
        }
    }
}

fn quote(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_char('"')?;
    for letter in text.chars() {
        match letter {
            '"' | '\\' => write!(f, "\\{letter}")?,
            '\u{20}'.. => f.write_char(letter)?,
            _ => write!(f, "\\u{:04x}", u32::from(letter))?,
        }
    }
    f.write_char('"')
}

const LEVELS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_json_has_them() {
        let list = Json::List(vec![1.5.into(), f64::NAN.into(), 3u64.into(), true.into()]);
        let object = Json::Object(vec![("a", list), ("b", "say \"\\\n\"".into())]);
        let line = r#"{"a": [1.5000,null,3,true],"b": "say \"\\\u000a\""}"#;
        assert_eq!(object.to_string(), line);
        assert_eq!(format!("{object:#}").replace(['\n', ' '], ""), line.replace(' ', ""));
    }
}

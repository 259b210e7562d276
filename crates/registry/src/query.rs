//! Query strings.

/// The parameters of a request, decoded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads `a=b&c=d`. What is not UTF-8 after decoding is left out.
    pub(crate) fn parse(text: Option<&str>) -> Self {
        let pairs = text.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let decoded = pairs.filter_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(name)?, decode(value)?))
        });
        Self(decoded.collect())
    }

    /// The first value of a parameter.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.values(name).next()
    }

    /// Every value of a parameter, in order.
    pub(crate) fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// A parameter's value as it stands in a query: all but letters, digits and `-._~` in percent signs.
pub(crate) fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().fold(String::with_capacity(text.len()), |mut encoded, byte| {
        match plain(byte) {
            true => encoded.push(char::from(byte)),
            false => encoded.push_str(&format!("%{byte:02X}")),
        }
        encoded
    })
}

fn decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(bytes.next()?)? * 16 + digit(bytes.next()?)?;
                u8::try_from(value).expect("two hexadecimal digits")
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parameters_are_decoded_and_bad_ones_left_out() {
        let query = Query::parse(Some("digest=sha256%3Aab&n=5&bad=%zz&cut=%4&empty=&flag&n=6"));
        assert_eq!(query.value("digest"), Some("sha256:ab"));
        assert_eq!(query.value("n"), Some("5"));
        assert_eq!(query.values("n").collect::<Vec<_>>(), ["5", "6"]);
        assert_eq!((query.value("bad"), query.value("cut")), (None, None));
        assert_eq!((query.value("empty"), query.value("flag")), (Some(""), Some("")));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(text in "\\PC{0,40}") {
            let query = format!("a={}", encode(&text));
            let parsed = Query::parse(Some(&query));
            prop_assert_eq!(parsed.value("a"), Some(text.as_str()));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC{0,60}") {
            Query::parse(Some(&text));
        }
    }
}

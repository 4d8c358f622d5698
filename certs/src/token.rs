//! Tokens by which a process shows others who it is: in a file or in the environment, read anew each time they are used,
//! because whoever puts them there replaces them.

use std::path::PathBuf;

use http::HeaderValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// More than any token is long.
const LONGEST: u64 = 64 << 10;

/// Where a token is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Token {
    /// The file that holds it, and nothing else.
    File(PathBuf),
    /// The environment variable that holds it.
    Env(String),
}

/// A token that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("the token in {}: {error}", .path.display())]
    Read { path: PathBuf, error: std::io::Error },
    #[error("the token in {}: {problem}", .path.display())]
    File { path: PathBuf, problem: &'static str },
    #[error("the token: the environment variable {0} is not set or not text")]
    Env(String),
    #[error("the token has characters that cannot be sent")]
    Characters,
}

impl Token {
    /// The token, without the space around it.
    ///
    /// # Errors
    /// There is none, with the place where it should be.
    pub async fn read(&self) -> Result<Zeroizing<String>, TokenError> {
        let text = match self {
            Self::Env(name) => {
                Zeroizing::new(std::env::var(name).map_err(|_| TokenError::Env(name.clone()))?)
            }
            Self::File(path) => {
                let wrong = |problem| TokenError::File { path: path.clone(), problem };
                let failed = |error| TokenError::Read { path: path.clone(), error };
                if tokio::fs::metadata(path).await.map_err(failed)?.len() > LONGEST {
                    return Err(wrong("the file is too large for one"));
                }
                let text = Zeroizing::new(tokio::fs::read_to_string(path).await.map_err(failed)?);
                if text.trim().is_empty() {
                    return Err(wrong("the file is empty"));
                }
                text
            }
        };
        Ok(Zeroizing::new(text.trim().to_owned()))
    }

    /// The token as the value of a header field, behind `before`.
    ///
    /// # Errors
    /// There is none, or it cannot be sent.
    pub async fn header(&self, before: &str) -> Result<HeaderValue, TokenError> {
        let token = self.read().await?;
        let text = Zeroizing::new(format!("{before}{}", token.as_str()));
        let mut value = HeaderValue::from_str(&text).map_err(|_| TokenError::Characters)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[tokio::test]
    async fn a_token_is_read_each_time_and_its_place_is_told_when_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::File(path.clone());
        assert!(token.read().await.unwrap_err().to_string().contains(&path.display().to_string()));
        std::fs::write(&path, " \n").unwrap();
        assert!(token.read().await.unwrap_err().to_string().contains("empty"));
        std::fs::write(&path, "first\n").unwrap();
        assert_eq!(token.read().await.unwrap().as_str(), "first");
        std::fs::write(&path, "second").unwrap();
        let value = token.header("Bearer ").await.unwrap();
        assert!(value.is_sensitive());
        assert_eq!(value, "Bearer second");
        std::fs::write(&path, "two\nlines").unwrap();
        assert!(token.header("").await.is_err());
        let unset = Token::Env("POSTERN_TEST_NO_SUCH_VARIABLE".to_owned());
        assert!(unset.read().await.unwrap_err().to_string().contains("POSTERN_TEST_NO_SUCH_VARIABLE"));
    }
}

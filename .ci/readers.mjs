// What postal-mime and mailparser read in mails: a JSON list of mails in base64 on stdin, a JSON list on stdout.
// Usage: node .ci/readers.mjs FOLDER, where FOLDER has both packages.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(pathToFileURL(`${process.argv[2]}/x.js`));
const PostalMime = (await import(pathToFileURL(require.resolve('postal-mime')))).default;
const { simpleParser } = require('mailparser');

const show = (mail, attachments) => ({
  subject: mail.subject ?? null,
  text: mail.text || null,
  html: mail.html || null,
  attachments: attachments.map(([name, type, content]) => [name || null, type, Buffer.from(content).toString('base64')]),
});

const readers = {
  'postal-mime': async (data) => {
    const mail = await PostalMime.parse(data, { forceRfc822Attachments: true });
    return show(mail, mail.attachments.map((a) => [a.filename, a.mimeType, a.content]));
  },
  mailparser: async (data) => {
    const mail = await simpleParser(data, {
      skipHtmlToText: true, skipTextToHtml: true, skipTextLinks: true, skipImageLinks: true, keepCidLinks: true,
    });
    return show(mail, mail.attachments.map((a) => [a.filename, a.contentType, a.content]));
  },
};

let input = '';
for await (const piece of process.stdin) input += piece;
const results = [];
for (const data of JSON.parse(input)) {
  const result = {};
  for (const [name, read] of Object.entries(readers)) {
    try {
      result[name] = await read(Buffer.from(data, 'base64'));
    } catch (error) {
      result[name] = { error: String(error) };
    }
  }
  results.push(result);
}
console.log(JSON.stringify(results));
